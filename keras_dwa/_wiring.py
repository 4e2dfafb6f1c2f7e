"""Connects a weighting and its model, and finds what is wrong with the connection."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from keras_dwa._compiled import is_compiled_with, lacks_compound_loss, losses_problem, own_step
from keras_dwa._keras_internals import compiled_loss_weights, track
from keras_dwa._ledger import Vector
from keras_dwa._loss_weights import LossWeight, LossWeights


def check_model(model: keras.Model, weights: LossWeights, in_fit: bool = True) -> None:
    """Raises a ValueError with all that is wrong with `model`, in the order in which to fix it.

    Args:
        model: a model, compiled if `fit` trains it.
        weights: the callback's weights.
        in_fit: whether `fit` trains it, so that a custom step needs a compound loss.
    """
    problems, has_record = [], weights.record is not None
    if in_fit or not lacks_compound_loss(model, has_record):
        problem = losses_problem(model, weights.entries, has_record)
        problems += [problem] if problem else []
        # For weights that are not attached yet, this is a guess.
        if (problems or is_tracked(model, weights)) and _hides(model, weights):
            problems.append(_hidden(model))
    if not isinstance(former := getattr(model, weights.name, None), LossWeights | None):
        problems.append(
            f"`model.{weights.name}` is reserved for the loss weights. Found {former!r}. Rename "
            "that attribute."
        )
    if len(problems) > 1:
        problems = [f"{number}. {problem}" for number, problem in enumerate(problems, 1)]
    if problems:
        raise ValueError("\n".join(problems))


def is_tracked(model: keras.Model, weights: LossWeights) -> bool:
    """Whether `model` passes the weights to its steps, unless its `metrics` hides them."""
    tracked = {id(variable) for metric in tracked_metrics(model) for variable in metric.variables}
    return tracked.issuperset(map(id, weights.variables))


def _hidden(model: keras.Model) -> str:
    return (
        f"`{type(model).__name__}.metrics` hides the loss weights from the training step, where "
        "JAX would turn them into constants. Return `[*super().metrics, ...]` from it."
    )


def _hides(model: keras.Model, weights: LossWeights) -> bool:
    """Whether `model.metrics` hides the weights from a step on JAX."""
    needed = weights.variables
    if not is_tracked(model, weights):
        needed = [variable for metric in tracked_metrics(model) for variable in metric.variables]
    visible = {id(variable) for variable in model.metrics_variables}
    return keras.backend.backend() == "jax" and not visible.issuperset(map(id, needed))


def tracked_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """The metrics that `model` tracks, even if it overrides `metrics`."""
    metrics: list[keras.metrics.Metric] = keras.Model.metrics.fget(model)
    return metrics


def records(model: keras.Model, weights: LossWeights) -> bool:
    """Whether `model` gets the weights from a compound loss instead of `compile`."""
    return weights.record is not None and not is_compiled_with(model, weights.entries)


def attach(model: keras.Model, weights: LossWeights) -> None:
    """Sets the weights as an attribute of `model`, unless its compound loss tracks them."""
    if not is_tracked(model, weights):
        track(model, weights)
    if weights.marks.logged():
        # As `compile` does, because a step that TensorFlow traced before does not return our logs.
        model.train_function = model.test_function = None
    if not lacks_compound_loss(model, weights.record is not None) and _hides(model, weights):
        raise ValueError(_hidden(model))


def logged_by_record(model: keras.Model, weights: LossWeights) -> tuple[str, ...]:
    """The outputs whose recorded losses we log, because no tracker of `model` does."""
    if not records(model, weights):
        return ()
    # A compound loss is also a metric.
    trackers = {m.name for m in model.metrics if not isinstance(m, keras.losses.Loss)}
    return tuple(name for name in weights.names if f"{name}_loss" not in trackers)


def check_attached(model: keras.Model | None, weights: LossWeights, callback: Any) -> None:
    """Raises an error unless this weighting is the one that `model` tracks."""
    if model is None:
        raise RuntimeError(
            f"{callback!r} was given no model. Write\n"
            "    keras.callbacks.CallbackList([weighting], model=model, ...)"
        )
    if not is_tracked(model, weights):
        other = getattr(model, weights.name)
        raise ValueError(
            f"`callbacks` has two weightings for one model. Found {callback!r} and one for "
            f"{list(other.names)}. Make one weighting with all outputs. If the losses are trained "
            "separately, make a compound loss for each weighting and set both as attributes of the "
            "model."
        )


def check_no_fit(is_running: bool) -> None:
    """Raises a RuntimeError if a `fit` is running or was interrupted."""
    if is_running:
        raise RuntimeError(
            "`step` ends an epoch, which `fit` does itself. To read the weights, write\n"
            "    weighting.loss_weights\n"
            "If that `fit` was interrupted, end it before your own loop with\n"
            "    weighting.on_train_end()"
        )


def check_metrics(model: keras.Model, names: Sequence[str]) -> None:
    """Raises a ValueError if another metric would replace an output's loss in the logs."""
    keys = Counter(metric.name for metric in model.metrics)
    # One of them is Keras's own.
    if clashing := [key for name in names if keys[key := f"{name}_loss"] > 1]:
        raise ValueError(
            f"`model` has other metrics named {clashing}, which would replace the outputs' losses "
            f"in the logs. Rename them:\n    keras.metrics.Mean(name='my_{clashing[0]}')"
        )


def check_record(by_record: bool, is_called: bool, is_recorded: bool) -> None:
    """Raises a ValueError if a compound loss was called in a step, but has no effect there.

    Args:
        by_record: whether the model was compiled without the weights.
        is_called: whether a step has called a compound loss, if only while it was traced.
        is_recorded: whether it recorded anything.
    """
    if is_recorded and not by_record:
        raise ValueError(
            "`model` was compiled with the weights of a compound loss, and training also calls "
            "that loss. Use only one of the two. (For validation, use `stateless_call`. Compiling "
            "again without a loss keeps the former one: make a new model.)"
        )
    if by_record and is_called and not is_recorded:
        raise ValueError(
            "What the compound loss recorded was lost, or `samples` was 0. From `train_step`, "
            "return the `metrics_variables` that `self.stateless_compute_loss` returns."
        )


def check_nested(model: keras.Model, logs: Mapping[str, float], weighted: float) -> None:
    """Raises a ValueError if losses that `compile` weighted are a term of the compound loss.

    Args:
        model: a model with a compound loss.
        logs: the logs of an epoch.
        weighted: the epoch's weighted sum of the compound loss.
    """
    compiled = keras.tree.flatten(compiled_loss_weights(model))
    inner = {weight.output: float(weight) for weight in compiled if isinstance(weight, LossWeight)}
    # Logs first: a weighting that is listed earlier may already have moved its weights.
    part = sum(logs.get(f"{n}_weight", w) * logs.get(f"{n}_loss", 0.0) for n, w in inner.items())
    # If the two were added, the total would be larger by that part.
    if abs(logs.get("loss", np.nan) - weighted) < 0.2 * abs(part):
        raise ValueError(
            "A compound loss weights a sum of losses that `compile` already weighted: "
            f"{list(inner)}. `base_loss` would be wrong. Add the two instead:\n"
            "    return super().compute_loss(...) + self.compound.combine({...})\n"
            "or compile without weights and pass each loss to `combine`."
        )


def unused_message(model: keras.Model) -> str:
    """The message for a model that did not call its compound loss in its first epoch."""
    return (
        "`model` was not compiled with the loss weights, and never called the compound loss. "
        f"Call it in `{own_step(model)}`, or write\n"
        "    model.compile(..., loss=compound.losses, loss_weights=compound.loss_weights)"
    )


def static_sums(
    suspects: NDArray[np.bool_],
    total: float,
    parts: Vector,
    static: Vector,
    weights: Mapping[str, float],
) -> NDArray[np.bool_]:
    """Which of the sums under static weights the total loss has equalled in every epoch so far.

    Raises a ValueError if it equals such a sum although the weights have clearly moved: they do not
    reach the loss.

    Args:
        suspects: the result for the epochs before. Shape `(n,)`.
        total: the total loss of an epoch.
        parts: what each loss adds to it under the weights of the epoch. Shape `(K,)`.
        static: the sums: under base weights, and the last one under no weights. Shape `(n,)`.
        weights: the weights of the epoch by output name, for the message.
    """
    weighted = float(parts.sum())
    if not np.isfinite([total, weighted, *static]).all():
        return suspects
    suspects = suspects & (abs(total - static) <= 1e-5 * abs(static))
    ignored = suspects & (abs(weighted - static) > 1e-3 * abs(static))
    if ignored.any():
        raise ValueError(
            f"The weights do not reach the loss. With the weights {weights}, it was {total}, the "
            f"sum under {'the base weights' if ignored[:-1].any() else 'no weights'}. Return "
            "`super().compute_loss(...)` or a CompoundLoss from `compute_loss`, and train on that "
            "in `train_step`."
        )
    return suspects
