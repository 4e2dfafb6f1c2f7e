"""Every check of how a weighting and its model were put together, and its message."""

import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_dwa._epoch_weights import Vector
from keras_dwa._keras_internals import compiled_loss_weights, track
from keras_dwa._loss_weights import LossWeight, LossWeights


def is_compiled_with(model: keras.Model, weights: LossWeights) -> bool:
    """Whether `model` was compiled with any of our weights."""
    compiled = keras.tree.flatten(compiled_loss_weights(model))
    return any(weight is own for weight in compiled for own in weights.entries.values())


def has_own(model: keras.Model, *methods: str) -> bool:
    """Whether the class of `model` overrides any of Keras's `methods`."""
    return any(
        getattr(type(model), method) is not getattr(keras.Model, method) for method in methods
    )


def check_model(model: keras.Model, weights: LossWeights, in_fit: bool = True) -> None:
    """Raises a ValueError with all that is wrong with `model`, in the order in which to mend it.

    Args:
        model: a model, compiled if it is to be trained by `fit`.
        weights: those of the callback.
        in_fit: whether Keras trains it, so that a step of its own must have a compound loss.
    """
    problems = _distribution(weights)
    if in_fit or not _lacks_compound_loss(model, weights):
        problems += _losses(model, weights)
        if keras.backend.backend() == "jax" and _hides(model, weights):
            problems.append(
                f"`{type(model).__name__}.metrics` hides the loss weights from the training step, "
                "in which JAX would freeze them. Return `[*super().metrics, ...]` from it."
            )
    if not isinstance(former := getattr(model, weights.name, None), LossWeights | None):
        problems.append(
            f"`model.{weights.name}` is taken: the loss weights are kept there. Found {former!r}. "
            "Give that another name."
        )
    if len(problems) > 1:
        problems = [f"{number}. {problem}" for number, problem in enumerate(problems, 1)]
    if problems:
        raise ValueError("\n".join(problems))


def _lacks_compound_loss(model: keras.Model, weights: LossWeights) -> bool:
    """Whether only a compound loss could bring the weights into the model's own step."""
    has_step = has_own(model, "train_step", "compute_loss")
    return model.loss is None and weights.record is None and has_step


def _losses(model: keras.Model, weights: LossWeights) -> list[str]:
    """What is wrong with the losses of `model`, if anything."""
    loss, loss_weights = model.loss, compiled_loss_weights(model)
    ours = weights.entries
    if not is_compiled_with(model, weights):
        if weights.record is not None:
            return []  # They may enter through a compound loss.
        if _lacks_compound_loss(model, weights):
            return [_combine_call(model, weights)]
        if loss is None:
            names = getattr(model, "output_names", list(ours))
            return [f"`model` was compiled without a loss. Write\n    {_compile_call(names)}"]
        return [
            "`model` was not compiled with this callback's loss weights: they would have no "
            f"effect. Found `loss_weights={loss_weights}`. Write\n    {_compile_call(ours)}\n"
            "Numbers of your own are base weights: outputs={name: number}"
        ]
    if isinstance(loss, (list, tuple)):
        outputs = model.output if hasattr(model, "output_names") else None
        if not isinstance(outputs, (list, tuple)) or not isinstance(loss_weights, (list, tuple)):
            return [
                "`model` was compiled with `loss` as a list. Keras pairs a list with a dict in "
                "alphabetical order of the names; two lists go by the outputs of a functional "
                "model that has a list of them. Else write dicts (a subclassed model must return "
                f"one, too):\n    {_compile_call(getattr(model, 'output_names', ours))}"
            ]
    elif not isinstance(loss, dict):
        names = getattr(model, "output_names", list(ours))
        if max(len(names), len(ours)) == 1:
            return []
        return [
            f"`model` was compiled with one loss, {loss!r}, for all its outputs. Compile with "
            f"a dict:\n    {_compile_call(names)}"
        ]
    elif any(
        isinstance(key, int) for path, _ in keras.tree.flatten_with_path(loss) for key in path
    ):
        return [
            f"`model` was compiled with a list within `loss={loss}`. Write each loss by itself, "
            "and nested outputs as dicts:\n"
            "    loss={'depth': 'mae', 'heads': {'left': 'mse', 'right': 'mse'}}"
        ]
    losses, found = _by_path(model, loss), _by_path(model, loss_weights)
    names = {path: _path_name(path) for path, value in losses.items() if value is not None}
    fixed = _fixed(model, weights)
    if set(names.values()) - set(fixed) != set(ours):
        outputs = list(names.values())
        return [
            f"`model` was compiled with losses for {outputs}, but the callback has the outputs "
            f"{list(ours)}. Make it with\n    outputs={outputs}\nand write\n"
            f"    {_compile_call(outputs)}\nor give the others a number:\n"
            "    loss_weights={**weighting.loss_weights, 'mask': 0.5}"
        ]
    # Keras pairs other structures by their order, which is not the same on every backend.
    is_alike = isinstance(loss, dict) == isinstance(loss_weights, dict)
    is_alike = is_alike and found.keys() == losses.keys()
    if not is_alike or any(found[p] is not ours[n] for p, n in names.items() if n in ours):
        return [
            f"`loss_weights={loss_weights}` must have the structure of `loss`, and each loss its "
            f"own weight. Compile with\n    loss_weights={_loss_weights_like(model, loss, fixed)}"
        ]
    return []


def _fixed(model: keras.Model, weights: LossWeights) -> dict[str, Any]:
    """Output name to weight, of the losses that `compile` got a weight of the user's own for."""
    return {
        name: weight
        for path, weight in _by_path(model, compiled_loss_weights(model)).items()
        if (name := _path_name(path)) not in weights.entries
        and not isinstance(weight, LossWeight | None)
    }


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


def _hides(model: keras.Model, weights: LossWeights) -> bool:
    visible = {id(variable) for variable in model.metrics_variables}
    if is_tracked(model, weights):
        return not visible.issuperset(map(id, weights.variables))
    return not visible.issuperset(id(v) for metric in _metrics(model) for v in metric.variables)


def _metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """The metrics that `model` tracks, whatever an override of `metrics` shows."""
    metrics: list[keras.metrics.Metric] = keras.Model.metrics.fget(model)
    return metrics


def attach(model: keras.Model, weights: LossWeights) -> None:
    """Sets the weights as an attribute of `model`, unless a compound loss that it has did."""
    if not is_tracked(model, weights):
        track(model, weights)
    if weights.in_logs:
        metrics = {metric.name for metric in model.metrics}
        weights.tracked = frozenset(name for name in weights.names if f"{name}_loss" in metrics)
        # As `compile` does: a step that TensorFlow traced before does not return our logs.
        model.train_function = model.test_function = None


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
            f"Call it in `{_own_step(model)}`, or write\n"
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
    total: float, losses: Vector, weights: LossWeights, had: Vector, looks_static: bool
) -> bool:
    """Raises a ValueError if the loss is, as in every epoch so far, the sum under the base weights.

    Args:
        total: the logged loss, without the outputs of a weight of their own.
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
    looks_static = looks_static and math.isclose(total, static, rel_tol=1e-5)
    if looks_static and not math.isclose(weighted, static, rel_tol=1e-3):
        raise ValueError(
            f"The weights do not reach the loss: it was {total}, the sum under the base weights, "
            f"with the weights {weights.by_name(had)}. Return `super().compute_loss(...)` or a "
            "CompoundLoss from `compute_loss`; train on that in `train_step`."
        )
    return looks_static


def fixed_part(model: keras.Model, logs: Mapping[str, float], weights: LossWeights) -> float:
    """What outputs with a weight of the user's own add to the loss; NaN if it is no number."""
    part = 0.0
    for name, weight in _fixed(model, weights).items():
        number = weight if isinstance(weight, (int, float)) else math.nan
        part += number * logs.get(f"{name}_loss", math.nan)
    return part


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


def _by_path(model: keras.Model, structure: Any) -> dict[tuple[Any, ...], Any]:
    """What `structure` has for each output, by path; that of a list is the output's name."""
    by_path = dict(keras.tree.flatten_with_path(structure))
    if isinstance(structure, (list, tuple)):
        return {(name,): by_path.get((k,)) for k, name in enumerate(model.output_names)}
    return by_path


def _path_name(path: tuple[Any, ...]) -> str:
    # As Keras names the losses in the logs.
    return "/".join(map(str, path))


def _compile_call(names: Iterable[str]) -> str:
    losses = ", ".join(f"{name!r}: ..." for name in names)
    return f"model.compile(..., loss={{{losses}}}, loss_weights=weighting.loss_weights)"


def _own_step(model: keras.Model) -> str:
    return "train_step" if has_own(model, "train_step") else "compute_loss"


def _combine_call(model: keras.Model, weights: LossWeights) -> str:
    """The code for the terms of a `compute_loss` or `train_step` of the user's own."""
    step = _own_step(model)
    if step == "train_step" and keras.backend.backend() == "jax":
        step = "compute_loss`, which `train_step` calls by `self.stateless_compute_loss"
    terms = ", ".join(f"{name!r}: ..." for name in weights.names)
    return (
        f"`{type(model).__name__}` has a step of its own and was compiled without a loss. Combine "
        "its losses by a compound loss with this callback: in `__init__`,\n"
        f"    self.compound = keras_dwa.CompoundLoss({list(weights.names)}, weighting)\n"
        f"and in `{step}`\n    loss = self.compound.combine({{{terms}}})\n"
        "If it has a compound loss, pass the callback that has it."
    )


def _loss_weights_like(
    model: keras.Model, loss: Any, fixed: Mapping[str, Any], path: tuple[Any, ...] = ()
) -> str:
    """The code for `loss_weights` in the structure of `loss`."""
    if isinstance(loss, dict):
        items = (
            f"{key!r}: {_loss_weights_like(model, loss[key], fixed, (*path, key))}" for key in loss
        )
        return f"{{{', '.join(items)}}}"
    if isinstance(loss, (list, tuple)):
        pairs = zip(model.output_names, loss, strict=False)
        items = (_loss_weights_like(model, value, fixed, (name,)) for name, value in pairs)
        return f"[{', '.join(items)}]"
    name = _path_name(path)
    if loss is None or name in fixed:
        return repr(fixed.get(name))
    return f"weighting.loss_weights[{name!r}]"
