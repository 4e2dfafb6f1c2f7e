"""What the logs hold: names, losses out of them, weights and `base_loss` into them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from keras_dwa._epoch_weights import EpochWeights, Vector
from keras_dwa._loss_weights import LossWeights

Logs = Mapping[str, float]


def check_log_names(names: Sequence[str]) -> None:
    """Raises a ValueError if two logs of outputs with these names would have the same key."""
    keys = Counter(["val_loss", "base_loss", "val_base_loss"])
    keys.update(f"{prefix}{name}_loss" for name in names for prefix in ("", "val_"))
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ValueError(
            f"The logs of outputs with these names would have {twice} twice: Keras logs "
            f"`<name>_loss` and `val_<name>_loss`. Rename an output. Found {list(names)}."
        )


def _missing_losses(logs: Logs, names: Sequence[str], prefix: str = "") -> list[str]:
    """Which of the losses that a model with these outputs logs are not there."""
    return [key for key in _keys(logs, names, prefix) if key not in logs]


def losses_of(logs: Logs, names: Sequence[str], had: Vector, prefix: str = "") -> Vector:
    """The outputs' unweighted losses, of an epoch that had these weights: float64, shape `(K,)`."""
    keys = _keys(logs, names, prefix)
    losses = np.array([logs[key] for key in keys], dtype=np.float64)
    if keys != [f"{prefix}loss"]:
        return losses
    # Already weighted. What it was at weight 0, nothing tells.
    return losses / np.where(had == 0, np.nan, had)


def epoch_losses(logs: Logs, weights: LossWeights) -> Vector:
    """The outputs' unweighted losses in the epoch that ends: float64, shape `(K,)`."""
    had = weights.epoch
    losses = losses_of(logs, weights.names, had.mean())
    if _keys(logs, weights.names, "") == ["loss"] and not had.is_constant and had.is_summed:
        losses = had.sums[:-1] / had.sums[-1]
    return losses


def _keys(logs: Logs, names: Sequence[str], prefix: str) -> list[str]:
    keys = [f"{prefix}{name}_loss" for name in names]
    # Keras logs the loss of a single output as `loss` alone.
    return [f"{prefix}loss"] if len(keys) == 1 and keys[0] not in logs else keys


def check_logs(logs: Logs, names: Sequence[str], had: Vector, may_lack: bool = False) -> None:
    """Raises a ValueError unless the logs of training have all losses, and room for ours.

    Args:
        logs: those of an epoch, or of its first step.
        names: those of the outputs.
        had: the weights that the epoch had.
        may_lack: whether it is right for losses to be missing.
    """
    missing = _missing_losses(logs, names)
    if missing and may_lack:
        return
    if missing:
        raise ValueError(
            f"`logs` lacks {missing}. It has {list(logs)}. Name the outputs so; return "
            "`self.compute_metrics(...)`, or averages named so, from `train_step`; in "
            "`compute_loss`, call `super().compute_loss(...)`, or a CompoundLoss and `compile` "
            "without a loss."
        )
    if taken := [key for name in names if (key := f"{name}_weight") in logs]:
        raise ValueError(f"`logs` has {taken} already. Give that metric or loss another name.")
    losses = losses_of(logs, names, had)
    if logs.get("loss") == 0 < had @ losses:
        raise ValueError(
            f"`loss` was 0 in the logs, although its parts were "
            f"{dict(zip(names, losses.tolist(), strict=True))}: nothing updates the metric that "
            "Keras logs. Leave `loss` out of your metrics and of what `train_step` returns, or "
            "update Keras's:\n"
            "    next(m for m in self.metrics if m.name == 'loss').update_state(loss)"
        )


def check_base_loss(logs: Logs) -> None:
    """Raises a ValueError if the logs of a step have what only the weighting logs."""
    if taken := [key for key in ("base_loss", "val_base_loss") if key in logs]:
        raise ValueError(f"`logs` has {taken} already. Give that metric another name.")


def add_to_logs(logs: dict[str, float], weights: LossWeights) -> list[str]:
    """Adds the weights that the epoch had, and the losses under the base weights.

    Returns:
        What there is to warn of.
    """
    names, had = weights.names, weights.epoch
    mean, losses = had.mean(), epoch_losses(logs, weights)
    logs.update({f"{name}_weight": weight for name, weight in weights.by_name(mean).items()})
    if "loss" in logs:
        # Another weighting, of other losses of the model, may have begun it.
        total = logs.get("base_loss", logs["loss"])
        parts = weighted_parts(had, losses)
        logs["base_loss"] = _base_loss(total, losses, parts, weights.base_weights)
    if "val_loss" not in logs:
        return []
    if missing := _missing_losses(logs, names, "val_"):
        return [
            f"adds no `val_base_loss`: the logs lack {missing}. A `test_step` of your own "
            "must return\n    self.compute_metrics(x, y, y_pred, sample_weight)"
        ]
    validation = had.weights if had.validation is None else had.validation
    losses = losses_of(logs, names, validation, "val_")
    if weights.in_logs and math.isfinite(logs["val_loss"]) and not np.isfinite(losses).all():
        return [
            "adds no `val_base_loss`: nothing was recorded in validation. In `compute_loss`, or a "
            "`test_step` of your own, `combine` the terms in validation, too."
        ]
    total = logs.get("val_base_loss", logs["val_loss"])
    parts = validation * losses
    logs["val_base_loss"] = _base_loss(total, losses, parts, weights.base_weights)
    return []


def weighted_parts(had: EpochWeights, losses: Vector) -> Vector:
    """The losses of an epoch times the weights that its batches had: float64, shape `(K,)`.

    Args:
        had: which those are.
        losses: the unweighted losses.
    """
    parts: Vector = had.mean() * losses
    if had.is_summed and not had.is_constant:
        parts = had.weighted / had.sums[-1]
    return parts


def _base_loss(total: float, losses: Vector, parts: Vector, base_weights: Vector) -> float:
    """What `total`, the sum of weighted `parts` and more, would be under the base weights."""
    if not math.isfinite(total):
        return total
    # A `test_step` of the user's own may sum the losses under the base weights, or under none.
    base_loss = float(base_weights @ losses)
    if math.isclose(total, base_loss, rel_tol=1e-5):
        return total
    if math.isclose(total, float(losses.sum()), rel_tol=1e-5):
        return base_loss
    with np.errstate(invalid="ignore"):
        return total + float((base_weights * losses - parts).sum())


def print_weights(source: str, weights: LossWeights, epoch: int) -> None:
    """Prints the weights in the manner of Keras's callbacks."""
    by_name = weights.by_name(weights.assigned)
    shown = ", ".join(f"{name}: {weight:.4f}" for name, weight in by_name.items())
    print(f"\nEpoch {epoch + 1}: {source} setting loss weights to {shown}.")
