"""Every check of how a weighting and its model were put together, and its message."""

import math
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from keras_dwa._keras_internals import compiled_loss_weights, track
from keras_dwa._epoch_weights import Vector
from keras_dwa._loss_weights import LossWeights


def is_compiled_with(model: keras.Model, weights: LossWeights) -> bool:
    """Whether `model` was compiled with any of our weights."""
    compiled = keras.tree.flatten(compiled_loss_weights(model))
    return any(weight is own for weight in compiled for own in weights.entries.values())


def check_compiled(model: keras.Model, weights: LossWeights) -> None:
    """Raises a ValueError that shows the call to write, unless each loss of `model` has its weight.

    Args:
        model: a compiled model.
        weights: those of the callback, whose entries the losses must have.
    """
    loss, loss_weights = model.loss, compiled_loss_weights(model)
    ours = weights.entries
    output_names = getattr(model, "output_names", list(ours))
    if loss is None:
        raise ValueError(
            f"`model` was compiled without a loss. Write\n    {_compile_call(output_names)}\n"
            "If it calls a compound loss, pass the callback that has it."
        )
    if not is_compiled_with(model, weights):
        raise ValueError(
            "`model` was not compiled with this callback's loss weights: they would have no "
            f"effect. Found `loss_weights={loss_weights}`. Write\n    {_compile_call(ours)}\n"
            "Numbers of your own are base weights: outputs={name: number}"
        )
    if isinstance(loss, (list, tuple)):
        raise ValueError(
            "`model` was compiled with `loss` as a list, which Keras pairs with `loss_weights` in "
            "alphabetical order. Compile with a dict (a subclassed model must return one, too):\n"
            f"    {_compile_call(output_names)}"
        )
    if not isinstance(loss, dict):
        if max(len(output_names), len(ours)) > 1:
            raise ValueError(
                f"`model` was compiled with one loss, {loss!r}, for all its outputs. Compile with "
                f"a dict:\n    {_compile_call(output_names)}"
            )
        return
    losses = dict(keras.tree.flatten_with_path(loss))
    if any(isinstance(key, int) for path in losses for key in path):
        raise ValueError(
            f"`model` was compiled with a list within `loss={loss}`. Write each loss by itself, "
            "and nested outputs as dicts:\n"
            "    loss={'depth': 'mae', 'heads': {'left': 'mse', 'right': 'mse'}}"
        )
    names = {path: _path_name(path) for path, value in losses.items() if value is not None}
    if set(names.values()) != set(ours):
        found = list(names.values())
        raise ValueError(
            f"`model` was compiled with losses for {found}, but the callback has the outputs "
            f"{list(ours)}. Make it with\n    outputs={found}\nand write\n"
            f"    {_compile_call(found)}"
        )
    # Keras pairs other structures by their order, which is not the same on every backend.
    paths = dict(keras.tree.flatten_with_path(loss_weights))
    if paths.keys() != losses.keys() or any(paths[p] is not ours[names[p]] for p in names):
        raise ValueError(
            f"`loss_weights={loss_weights}` must have the structure of `loss`, and each loss its "
            f"own weight. Compile with\n    loss_weights={_loss_weights_like(loss)}"
        )


def check_distribution(weights: LossWeights) -> None:
    """Raises a ValueError if JAX would refuse the weights together with a distributed model."""
    distribution = keras.distribution.distribution()
    if keras.backend.backend() == "jax" and distribution is not None and not weights.is_distributed:
        raise ValueError(
            f"The callback was made before the distribution was set. Found {distribution}. Call\n"
            "    keras.distribution.set_distribution(...)\nand then make the callback."
        )


def attach(model: keras.Model, weights: LossWeights) -> None:
    """Sets the weights as an attribute of `model`, or raises a ValueError."""
    former = getattr(model, weights.name, None)
    if not isinstance(former, LossWeights | None):
        raise ValueError(
            f"`model.{weights.name}` is taken: the loss weights are kept there. Found {former!r}. "
            "Give that another name."
        )
    track(model, weights)
    if weights.in_logs:
        # As `compile` does: a step that TensorFlow traced before does not return our logs.
        model.train_function = model.test_function = None
    tracked = {id(variable) for variable in model.metrics_variables}
    if not tracked.issuperset(map(id, weights.variables)):
        raise ValueError(
            f"`{type(model).__name__}.metrics` hides the loss weights from the training step, in "
            "which JAX would freeze them. Return `[*super().metrics, ...]` from it."
        )


def check_attached(model: keras.Model | None, weights: LossWeights, callback: Any) -> None:
    """Raises an error unless the `fit` that begins trains `model` by this weighting alone."""
    if model is None:
        raise RuntimeError(
            f"{callback!r} was given no model. Write\n"
            "    keras.callbacks.CallbackList([weighting], model=model, ...)"
        )
    if (attached := getattr(model, weights.name)) is not weights:
        raise ValueError(
            f"`callbacks` has two weightings for one model. Found {callback!r} beside one of "
            f"{list(attached.names)}. Make one with all outputs."
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
    if not weights.in_logs:
        # Again, for a callback may have compiled the model since.
        check_compiled(model, weights)
    _check_metrics(model, weights)
    called = weights.recorded_averages() is not None
    if weights.in_logs and not called:
        raise ValueError(
            "`model` was neither compiled with the loss weights, nor called the compound loss. "
            "Call it in `compute_loss`, or write\n"
            "    model.compile(..., loss=compound.losses, loss_weights=compound.loss_weights)"
        )
    if called and not weights.in_logs:
        raise ValueError(
            "The compound loss was called in training, and the model compiled with its weights as "
            "well. Use one way; validate by `stateless_call`. (`compile` without a loss keeps the "
            "former: make the model anew.)"
        )


def _check_metrics(model: keras.Model, weights: LossWeights) -> None:
    """Raises a ValueError if the logs of an output's loss would be those of another metric."""
    keys = Counter(metric.name for metric in model.metrics)
    # One is Keras's own for a loss in `compile`; a compound loss has `weights`, of another name.
    expected = 0 if weights.in_logs else 1
    taken = [key for name in weights.names if keys[key := f"{name}_loss"] > expected]
    if taken and weights.in_logs:
        raise ValueError(
            f"`model` has metrics named {taken}, in place of what the compound loss logs. Leave "
            "them out, or write\n"
            "    model.compile(..., loss=compound.losses, loss_weights=compound.loss_weights)"
        )
    if taken:
        raise ValueError(
            f"`model` has other metrics named {taken}, which would replace the outputs' losses in "
            f"the logs. Give them other names:\n    keras.metrics.Mean(name='my_{taken[0]}')"
        )


def check_effect(
    total: float, losses: Vector, weights: LossWeights, had: Vector, looks_static: bool
) -> bool:
    """Raises a ValueError if the loss is, as in every epoch so far, the sum under the base weights.

    Args:
        total: the logged loss.
        losses: its unweighted parts.
        weights: those of the weighting.
        had: the weights that all batches of the epoch had.
        looks_static: whether the loss was that sum in every epoch before.

    Returns:
        The `looks_static` of the next epoch.
    """
    static = float(weights.base_weights @ losses)
    if not math.isfinite(total + static):
        return looks_static
    weighted = float(had @ losses)
    if total == 0 < weighted:
        raise ValueError(
            f"`loss` was 0 in the logs, although its parts were {weights.by_name(losses)}. Update "
            "Keras's metric of it in a `train_step`:\n"
            "    next(m for m in self.metrics if m.name == 'loss').update_state(loss)"
        )
    looks_static = looks_static and math.isclose(total, static, rel_tol=1e-5)
    if looks_static and not math.isclose(weighted, static, rel_tol=1e-3):
        raise ValueError(
            f"The weights do not reach the loss: it was {total}, the sum under the base weights, "
            f"with the weights {weights.by_name(had)}. Return `super().compute_loss(...)` or a "
            "CompoundLoss from `compute_loss`; train on that in `train_step`."
        )
    return looks_static


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


def lacks_weights(model: keras.Model, params: Any, epoch: int) -> bool:
    """Whether `History` took the first epoch of the `fit` that has `params` before the weights."""
    history = getattr(model, "history", None)
    return (
        isinstance(history, keras.callbacks.History)
        and history.params is params
        and history.epoch == [epoch]
    )


def _path_name(path: tuple[Any, ...]) -> str:
    # As Keras names the losses in the logs.
    return "/".join(map(str, path))


def _compile_call(names: Iterable[str]) -> str:
    losses = ", ".join(f"{name!r}: ..." for name in names)
    return f"model.compile(..., loss={{{losses}}}, loss_weights=weighting.loss_weights)"


def _loss_weights_like(loss: Any, path: tuple[Any, ...] = ()) -> str:
    """The code for `loss_weights` in the structure of `loss`."""
    if isinstance(loss, dict):
        items = (f"{key!r}: {_loss_weights_like(loss[key], (*path, key))}" for key in loss)
        return f"{{{', '.join(items)}}}"
    return "None" if loss is None else f"weighting.loss_weights[{_path_name(path)!r}]"
