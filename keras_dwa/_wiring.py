"""Every check of how a weighting and its model were put together, and its message."""

import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_dwa._compiled import (
    fixed_part,
    is_compiled_with,
    lacks_compound_loss,
    losses_problems,
    own_step,
)
from keras_dwa._epoch_weights import Vector
from keras_dwa._keras_internals import track
from keras_dwa._logs import weighted_parts
from keras_dwa._loss_weights import LossWeights, State

# What to warn of where one weighting serves two models in turn.
RETURN_MESSAGE = (
    "comes back to a model after it was with another one, and starts afresh. Make a weighting for "
    "each model:\n    other_model.compile(..., loss_weights=other_weighting.loss_weights)"
)


def check_model(model: keras.Model, weights: LossWeights, in_fit: bool = True) -> None:
    """Raises a ValueError with all that is wrong with `model`, in the order in which to mend it.

    Args:
        model: a model, compiled if it is to be trained by `fit`.
        weights: those of the callback.
        in_fit: whether Keras trains it, so that a step of its own must have a compound loss.
    """
    problems = _distribution(weights)
    if in_fit or not lacks_compound_loss(model, weights):
        problems += losses_problems(model, weights)
        # Whether weights that are not attached yet would be hidden, is a guess.
        if (problems or is_tracked(model, weights)) and _hides(model, weights):
            problems.append(_hidden(model))
    if not isinstance(former := getattr(model, weights.name, None), LossWeights | None):
        problems.append(
            f"`model.{weights.name}` is taken: the loss weights are kept there. Found {former!r}. "
            "Give that another name."
        )
    if len(problems) > 1:
        problems = [f"{number}. {problem}" for number, problem in enumerate(problems, 1)]
    if problems:
        raise ValueError("\n".join(problems))


def _distribution(weights: LossWeights) -> list[str]:
    """What JAX would refuse in the weights together with a distributed model, if anything."""
    distribution = keras.distribution.distribution()
    if keras.backend.backend() != "jax" or distribution is None or weights.is_distributed:
        return []
    return [
        f"The callback was made before the distribution was set. Found {distribution}. Call\n"
        "    keras.distribution.set_distribution(...)\nand then make the callback."
    ]


def is_tracked(model: keras.Model, weights: LossWeights) -> bool:
    """Whether `model` hands the weights to its steps, unless its `metrics` hides them."""
    tracked = {id(variable) for metric in _metrics(model) for variable in metric.variables}
    return tracked.issuperset(map(id, weights.variables))


def _hidden(model: keras.Model) -> str:
    return (
        f"`{type(model).__name__}.metrics` hides the loss weights from the training step, in "
        "which JAX would freeze them. Return `[*super().metrics, ...]` from it."
    )


def _hides(model: keras.Model, weights: LossWeights) -> bool:
    """Whether `model.metrics` keeps the weights from a step on JAX."""
    needed = weights.variables
    if not is_tracked(model, weights):
        needed = [variable for metric in _metrics(model) for variable in metric.variables]
    visible = {id(variable) for variable in model.metrics_variables}
    return keras.backend.backend() == "jax" and not visible.issuperset(map(id, needed))


def _metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """The metrics that `model` tracks, whatever an override of `metrics` shows."""
    metrics: list[keras.metrics.Metric] = keras.Model.metrics.fget(model)
    return metrics


def attach(model: keras.Model, weights: LossWeights) -> None:
    """Sets the weights as an attribute of `model`, unless a compound loss that it has did."""
    if not is_tracked(model, weights):
        track(model, weights)
    if weights.in_logs:
        # A compound loss is one, too.
        theirs = [metric for metric in model.metrics if not isinstance(metric, keras.losses.Loss)]
        metrics = {metric.name for metric in theirs}
        weights.tracked = frozenset(name for name in weights.names if f"{name}_loss" in metrics)
        # As `compile` does: a step that TensorFlow traced before does not return our logs.
        model.train_function = model.test_function = None
    if not lacks_compound_loss(model, weights) and _hides(model, weights):
        raise ValueError(_hidden(model))


def check_attached(model: keras.Model | None, weights: LossWeights, callback: Any) -> None:
    """Raises an error unless the `fit` that begins trains `model` by this weighting alone."""
    if model is None:
        raise RuntimeError(
            f"{callback!r} was given no model. Write\n"
            "    keras.callbacks.CallbackList([weighting], model=model, ...)"
        )
    if not is_tracked(model, weights):
        other = getattr(model, weights.name)
        raise ValueError(
            f"`callbacks` has two weightings for one model. Found {callback!r} beside one of "
            f"{list(other.names)}. Make one with all outputs; or, for losses that are trained "
            "apart, make the compound loss of each an attribute of the model."
        )


def check_once(params: Any, callback: keras.callbacks.Callback) -> None:
    """Raises a ValueError if the `fit` that has these `params` has the callback twice."""
    if params is callback.params is not None:
        raise ValueError(
            f"`callbacks` has {callback!r} more than once. Write\n"
            "    model.fit(..., callbacks=[weighting])"
        )


def check_no_fit(thread: int | None) -> None:
    """Raises a RuntimeError if a `fit` is under way, or was broken off."""
    if thread is not None:
        raise RuntimeError(
            "`step` closes an epoch, which `fit` does itself. Read the weights by\n"
            "    weighting.loss_weights\n"
            "For a loop of your own after a `fit` that was broken off, end that one by\n"
            "    weighting.on_train_end()"
        )


def check_one_fit(thread: int | None, callback: Any) -> None:
    """Raises a RuntimeError unless `thread`, that of the `fit` that began last, is this one."""
    if thread != threading.get_ident():
        raise RuntimeError(
            f"{callback!r} was used by another `fit` at the same time, or in another thread; or "
            "`on_train_begin` was not called. Make one for each model, and in a loop of your own "
            "call\n    weighting.step({name: average, ...})"
        )


def check_first_batches(model: keras.Model, weights: LossWeights) -> None:
    """Raises a ValueError if the steps that were run did not use the weights once for each loss."""
    # Again, for a callback may have compiled the model since.
    check_model(model, weights)
    is_compiled, recorded = is_compiled_with(model, weights), weights.recorded()
    if is_compiled:
        _check_metrics(model, weights)
    if weights.was_reset:
        return  # By an evaluation after the steps, of which nothing is recorded any more.
    if is_compiled and recorded is not None:
        raise ValueError(
            "The compound loss was called in training, and the model compiled with its weights as "
            "well. Use one way; validate by `stateless_call`. (`compile` without a loss keeps the "
            "former: make the model anew.)"
        )
    if not is_compiled and recorded is None and weights.called:
        raise ValueError(
            "What the compound loss recorded is lost. Return from `train_step` the "
            "`metrics_variables` that `self.stateless_compute_loss` gives; see "
            "docs/own_steps.md."
        )
    if not is_compiled and recorded is None:
        raise ValueError(
            "`model` was neither compiled with the loss weights, nor called the compound loss. "
            f"Call it in `{own_step(model)}`, or write\n"
            "    model.compile(..., loss=compound.losses, loss_weights=compound.loss_weights)"
        )


def _check_metrics(model: keras.Model, weights: LossWeights) -> None:
    """Raises a ValueError if the logs of an output's loss would be those of another metric."""
    keys = Counter(metric.name for metric in model.metrics)
    # One is Keras's own.
    if taken := [key for name in weights.names if keys[key := f"{name}_loss"] > 1]:
        raise ValueError(
            f"`model` has other metrics named {taken}, which would replace the outputs' losses in "
            f"the logs. Give them other names:\n    keras.metrics.Mean(name='my_{taken[0]}')"
        )


def check_effect(
    model: keras.Model, weights: LossWeights, logs: Mapping[str, float], losses: Vector
) -> None:
    """Raises a ValueError if the loss is, as in every epoch so far, a sum under other weights.

    Args:
        model: the model that is trained.
        weights: those of the weighting.
        logs: those of the epoch.
        losses: its unweighted losses.
    """
    epoch = weights.epoch
    total = logs.get("loss", math.nan) - fixed_part(model, logs, weights)
    weighted = float(weighted_parts(epoch, losses).sum())
    static = np.array([weights.base_weights @ losses, losses.sum()])
    is_known = epoch.is_constant or epoch.is_summed
    if not is_known or not np.isfinite([total, weighted, *static]).all():
        return
    weights.looks_static &= abs(total - static) <= 1e-5 * abs(static)
    ignored = weights.looks_static & (abs(weighted - static) > 1e-3 * abs(static))
    if ignored.any():
        raise ValueError(
            f"The weights do not reach the loss: it was {total}, the sum under "
            f"{'the base weights' if ignored[0] else 'no weights'}, with the weights "
            f"{weights.by_name(weights.epoch.mean())}. Return `super().compute_loss(...)` or a "
            "CompoundLoss from `compute_loss`; train on that in `train_step`."
        )


def put_back(weights: LossWeights) -> list[str]:
    """Undoes what else was assigned to the weights; returns what there is to warn of."""
    found = weights.values()
    if np.array_equal(found, weights.assigned):
        return []
    weights.vector.assign(weights.assigned)
    return [
        f"found loss weights assigned by hand, {weights.by_name(found)}, and goes on with its own, "
        f"{weights.by_name(weights.assigned)}. Write `weighting.assign({{name: factor}})`; under "
        "`jax.jit`, read `weighting.variables` anew after each `step`."
    ]


def start_messages(weights: LossWeights, is_new: bool, epoch: int) -> list[str]:
    """What there is to warn of where a `fit` begins: a file of another rule, unknown epochs before.

    Args:
        weights: those of the weighting.
        is_new: whether the weighting started afresh with this model.
        epoch: the epoch that begins, from 0.
    """
    messages, known = [], weights.state.epochs
    if weights.file and weights.file not in weights.rules:
        messages.append(
            f"goes on with the factors that a {weights.file} left in the file, without its `state`."
        )
    if weights.file and epoch > known:
        messages.append(
            f"goes on with epoch {epoch + 1}, but the file that was read knows of only "
            f"{known} before it. List the callback that writes it last:\n"
            "    callbacks=[weighting, keras.callbacks.BackupAndRestore(...)]"
        )
    elif is_new and epoch > known:
        if weights.file is None:
            hint = "To go on, call `weighting.set_model(model)` before `model.load_weights(...)`."
        else:
            hint = "The file that was read has no state that this release knows."
        messages.append(
            f"begins with epoch {epoch + 1}, but starts afresh. {hint} To start here, call "
            "`weighting.set_model(model)` and `weighting.reset()` before `fit`."
        )
    return messages


def no_batch_message(epoch: int) -> str:
    """What to warn of where an epoch, counted from 0, had no batch."""
    return (
        f"holds the loss weights: epoch {epoch + 1} had no batch. (In a loop of your own, call "
        "`on_train_batch_end` for each, or `weighting.step({name: average, ...})`.)"
    )


def window_messages(state: State, update_freq: Any) -> list[str]:
    """What there is to warn of where a `fit` ends.

    Args:
        state: that of the weights.
        update_freq: how many batches a window has, or "epoch".
    """
    if update_freq == "epoch" or state.periods > 0 or state.window[-1] == 0:
        return []
    return [
        f"moved no weight: `update_freq={update_freq}` batches are more than the "
        f"{int(state.window[-1])} that were trained so far. Choose a smaller one, or 'epoch'."
    ]


def poisoned(total: float, losses: Vector, had: Vector, names: Sequence[str]) -> list[str]:
    """What there is to warn of where a loss of weight 0 makes the total NaN."""
    found = [
        name for name, bad in zip(names, (had == 0) & ~np.isfinite(losses), strict=True) if bad
    ]
    if not found or math.isfinite(total):
        return []
    return [
        f"found the loss of {found} not finite while its weight was 0. Keras multiplies them, and "
        "0 * nan is nan. Make finite what goes into the loss:\n"
        "    keras.ops.nan_to_num(y_true, posinf=0.0, neginf=0.0)"
    ]


def history_messages(model: keras.Model, params: Any, epoch: int) -> list[str]:
    """What there is to warn of where `History` took the first epoch of a `fit` before the weights.

    Args:
        model: the model that is trained.
        params: what the `fit` gave to its callbacks.
        epoch: the epoch that ends, from 0.
    """
    history = getattr(model, "history", None)
    if not isinstance(history, keras.callbacks.History) or history.params is not params:
        return []
    if history.epoch != [epoch]:
        return []
    return [
        "comes after `History` in the list of callbacks, which lacks what it logs. Write\n"
        "    model.fit(..., callbacks=[weighting, history])"
    ]
