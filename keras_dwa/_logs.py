"""The logs: their names, the losses in them, and the weights and `base_loss` that we add."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from keras_dwa._backends import floatx_range
from keras_dwa._ledger import Ledger, Vector, loss_parts
from keras_dwa._loss_weights import as_float

Logs = Mapping[str, float]


def make_floats(logs: dict[str, float]) -> None:
    """Converts all numbers to Python floats. Keras leaves bfloat16 ones as they are."""
    for key, value in logs.items():
        if type(value) is not float and (number := as_float(value)) is not None:
            logs[key] = number


def check_log_names(names: Sequence[str]) -> None:
    """Raises a ValueError if outputs with these names would have the same key in the logs."""
    keys = Counter(["val_loss", "base_loss", "val_base_loss"])
    keys.update(f"{prefix}{name}_loss" for name in names for prefix in ("", "val_"))
    if duplicates := [key for key, count in keys.items() if count > 1]:
        raise ValueError(
            f"The logs would have {duplicates} twice, because Keras logs `<name>_loss` and "
            f"`val_<name>_loss` for each output. Rename an output. Found {list(names)}."
        )


def logged_losses(logs: Logs, names: Sequence[str], weights: Vector, prefix: str = "") -> Vector:
    """The unweighted losses in the logs of an epoch: float64, shape `(K,)`."""
    keys = _keys(logs, names, prefix)
    losses = np.array([logs[key] for key in keys], dtype=np.float64)
    if keys != [f"{prefix}loss"]:
        return losses
    # Already weighted. At weight 0, the unweighted loss is unknown.
    return losses / np.where(weights == 0, np.nan, weights)


def _keys(logs: Logs, names: Sequence[str], prefix: str = "") -> list[str]:
    keys = [f"{prefix}{name}_loss" for name in names]
    # Keras logs the loss of a single output as `loss` alone.
    return [f"{prefix}loss"] if len(keys) == 1 and keys[0] not in logs else keys


def _missing_losses(logs: Logs, names: Sequence[str], prefix: str = "") -> list[str]:
    """The keys of losses that are missing from the logs."""
    return [key for key in _keys(logs, names, prefix) if key not in logs]


def check_logs(logs: Logs, names: Sequence[str], may_lack: bool = False) -> None:
    """Raises a ValueError if training logs lack a loss, or already have a key of ours.

    Args:
        logs: the logs of an epoch, or of its first step.
        names: the names of the outputs.
        may_lack: whether losses may be missing.
    """
    missing = _missing_losses(logs, names)
    if missing and not may_lack:
        raise ValueError(
            f"`logs` lacks {missing}. It has {list(logs)}. Check the names of the outputs. From "
            "`train_step`, return `self.compute_metrics(...)` or averages with these names. In "
            "`compute_loss`, call `super().compute_loss(...)`, or call a CompoundLoss and "
            "`compile` without a loss."
        )
    if clashing := [key for name in names if (key := f"{name}_weight") in logs]:
        raise ValueError(f"`logs` already has {clashing}. Rename that metric or loss.")


def check_total(logs: Logs, weighted: float) -> None:
    """Raises a ValueError if the total loss is 0 in the logs, and the weighted sum is not."""
    smallest, _ = floatx_range()
    if logs.get("loss") == 0 and weighted > 100 * smallest:  # A smaller sum may underflow.
        raise ValueError(
            f"`loss` was 0 in the logs, although the weighted losses sum to {weighted}. Nothing "
            "updates the metric that Keras logs. Leave `loss` out of your metrics and out of what "
            "`train_step` returns, or update Keras's metric:\n"
            "    next(m for m in self.metrics if m.name == 'loss').update_state(loss)"
        )


def check_first_logs(logs: Logs, names: Sequence[str], weights: Vector, may_lack: bool) -> None:
    """Raises a ValueError if the logs of the first step would be refused for an epoch."""
    if clashing := [key for key in ("base_loss", "val_base_loss") if key in logs]:
        raise ValueError(f"`logs` already has {clashing}. Rename that metric.")
    check_logs(logs, names, may_lack)
    if not _missing_losses(logs, names):
        check_total(logs, float(weights @ logged_losses(logs, names, weights)))


def add_recorded_losses(
    logs: dict[str, float], losses: Mapping[str, float], logged: Sequence[str]
) -> None:
    """Adds recorded averages to the logs, but keeps what the model's own trackers log.

    Args:
        logs: the logs of an epoch.
        losses: the epoch's averages by output name.
        logged: the names of outputs whose losses come from the record.
    """
    for name, loss in losses.items():
        if name in logged or f"{name}_loss" not in logs:
            logs[f"{name}_loss"] = loss


def add_weights(logs: dict[str, float], names: Sequence[str], weights: Vector) -> None:
    """Adds the weights of an epoch or batch."""
    by_name = zip(names, weights.tolist(), strict=True)
    logs.update({f"{name}_weight": weight for name, weight in by_name})


def remove_weights(logs: dict[str, float], names: Sequence[str]) -> None:
    """Removes what `add_weights` added."""
    for name in names:
        logs.pop(f"{name}_weight", None)


def add_base_loss(
    logs: dict[str, float],
    ledger: Ledger,
    losses: Vector,
    base_weights: Vector,
    rest: float | None,
) -> None:
    """Adds the total loss under the base weights, if the logs have a total loss.

    Args:
        logs: the logs of an epoch.
        ledger: the segments of the epoch.
        losses: the averages of its losses.
        base_weights: the base weights.
        rest: the part of the total that is not in `losses`; None if only the total tells.
    """
    if "loss" in logs and rest is not None:
        logs["base_loss"] = float(base_weights @ losses) + rest
    elif "loss" in logs:
        # Another weighting, for other losses of the model, may have added it already.
        total, parts = logs.get("base_loss", logs["loss"]), loss_parts(ledger, losses)
        base_parts = loss_parts(ledger, losses, base_weights)
        logs["base_loss"] = _base_loss(total, parts, base_parts, losses)


def add_val_base_loss(
    logs: dict[str, float],
    names: Sequence[str],
    weights: Vector,
    base_weights: Vector,
    recorded: Vector | None,
    rest: float | None,
) -> str | None:
    """Adds the validation's total loss under the base weights, if the logs have a total.

    Args:
        logs: the logs of an epoch.
        names: the names of the outputs.
        weights: the weights during validation.
        base_weights: the base weights.
        recorded: the averages that a compound loss recorded in validation, NaN if it was not
            called; None if the model has no compound loss.
        rest: as in `add_base_loss`.

    Returns:
        A warning if it cannot, else None.
    """
    if "val_loss" not in logs:
        return None
    losses = recorded
    if losses is None or np.isnan(losses).any():
        if missing := _missing_losses(logs, names, "val_"):
            return (
                f"adds no `val_base_loss`: the logs lack {missing}. From your `test_step`, "
                "return\n    self.compute_metrics(x, y, y_pred, sample_weight)"
            )
        losses = logged_losses(logs, names, weights, "val_")
    if recorded is not None and np.isnan(losses).any() and math.isfinite(logs["val_loss"]):
        return (
            "adds no `val_base_loss`: validation recorded nothing. Also `combine` the terms in "
            "validation, in `compute_loss` or your own `test_step`."
        )
    if rest is not None:
        logs["val_base_loss"] = float(base_weights @ losses) + rest
        return None
    total = logs.get("val_base_loss", logs["val_loss"])
    logs["val_base_loss"] = _base_loss(total, weights * losses, base_weights * losses, losses)
    return None


def logged_if_recorded(
    logs: Logs, names: Sequence[str], recorded: Vector, logged: Sequence[str]
) -> Vector:
    """The recorded averages of a validation, from the logs if they hold them.

    The record itself may already hold a later evaluation.
    """
    by_name = zip(names, recorded.tolist(), strict=True)
    return np.array([logs.get(f"val_{n}_loss", v) if n in logged else v for n, v in by_name])


def _base_loss(total: float, parts: Vector, base_parts: Vector, losses: Vector) -> float:
    """What `total`, the sum of weighted `parts` and a rest, would be under the base weights."""
    weighted, base_loss = float(parts.sum()), float(base_parts.sum())
    # A custom `test_step` may sum the losses under the base weights, or under none.
    if not math.isfinite(total) or math.isclose(total, base_loss, rel_tol=1e-5):
        return total
    if math.isclose(total, float(losses.sum()), rel_tol=1e-5):
        return base_loss
    # A step that uses a compound loss several times may add up its values.
    uses = total / weighted if weighted else math.nan
    if uses > 1.5 and math.isclose(uses, round(uses), rel_tol=1e-5):
        return uses * base_loss
    return total - weighted + base_loss


def print_weights(source: str, weights: Mapping[str, float], epoch: int) -> None:
    """Prints the weights in the style of Keras's callbacks."""
    print(f"\nEpoch {epoch + 1}: {source} setting loss weights to {_shown(weights)}.")


def print_base_weights(
    source: str, base_weights: Mapping[str, float], losses: Mapping[str, float]
) -> None:
    """Prints the base weights that `adapt` set, and the losses that it found."""
    print(f"\n{source} setting base weights to {_shown(base_weights)}.")
    print(f"The losses are {_shown(losses)}.")


def _shown(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {value:.4f}" for name, value in values.items())
