"""What `compile` got: the losses, their weights, and what is wrong with them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from keras_dwa._epoch_weights import Vector
from keras_dwa._keras_internals import compiled_loss_weights
from keras_dwa._loss_record import to_numpy
from keras_dwa._loss_weights import LossWeight, LossWeights
from keras_dwa._ranks import total_in_fit


def is_compiled_with(model: keras.Model, weights: LossWeights) -> bool:
    """Whether `model` was compiled with any of our weights."""
    compiled = keras.tree.flatten(compiled_loss_weights(model))
    return any(weight is own for weight in compiled for own in weights.entries.values())


def has_own(model: keras.Model, *methods: str) -> bool:
    """Whether the class of `model` overrides any of Keras's `methods`."""
    return any(
        getattr(type(model), method) is not getattr(keras.Model, method) for method in methods
    )


def lacks_compound_loss(model: keras.Model, weights: LossWeights) -> bool:
    """Whether only a compound loss could bring the weights into the model's own step."""
    has_step = has_own(model, "train_step", "compute_loss")
    return model.loss is None and weights.record is None and has_step


def losses_problems(model: keras.Model, weights: LossWeights) -> list[str]:
    """What is wrong with the losses of `model`, if anything."""
    loss, loss_weights = model.loss, compiled_loss_weights(model)
    ours, output_names = weights.entries, _output_names(model, weights)
    if not is_compiled_with(model, weights):
        if weights.record is not None:
            return []  # They may enter through a compound loss.
        if lacks_compound_loss(model, weights):
            return [_combine_call(model, weights)]
        if loss is None:
            return [
                f"`model` was compiled without a loss. Write\n    {_compile_call(output_names)}"
            ]
        return [
            "`model` was not compiled with this callback's loss weights: they would have no "
            f"effect. Found `loss_weights={loss_weights}`. Write\n"
            f"    {_compile_call(output_names)}\n"
            "Numbers of your own are base weights: outputs={name: number}"
        ]
    if isinstance(loss, (list, tuple)):
        outputs = model.output if hasattr(model, "output_names") else None
        if not isinstance(outputs, (list, tuple)) or not isinstance(loss_weights, (list, tuple)):
            return [
                "`model` was compiled with `loss` as a list. Keras pairs a list with a dict in "
                "alphabetical order of the names; two lists go by the outputs of a functional "
                "model that has a list of them. Else write dicts (a subclassed model must return "
                f"one, too):\n    {_compile_call(output_names)}"
            ]
    elif not isinstance(loss, dict):
        if max(len(output_names), len(ours)) == 1:
            return []
        return [
            f"`model` was compiled with one loss, {loss!r}, for all its outputs. Compile with "
            f"a dict:\n    {_compile_call(output_names)}"
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
    outputs = [name for name in names.values() if name not in fixed]
    if set(outputs) != set(ours):
        more = [name for name in outputs if name not in ours]
        return [
            f"`model` was compiled with losses for {outputs}, but the callback has the outputs "
            f"{list(ours)}. Make it with\n    outputs={outputs}\nand write\n"
            f"    {_compile_call(outputs)}\n"
            + (
                f"or give the others a number: {{**weighting.loss_weights, {more[0]!r}: 0.5}}"
                if more
                else "A term that is no output needs a compound loss for all of them."
            )
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


def fixed_part(model: keras.Model, logs: Mapping[str, float], weights: LossWeights) -> float:
    """What outputs with a weight of the user's own add to the loss; NaN if it is no number."""
    part = 0.0
    for name, weight in _fixed(model, weights).items():
        number = weight if isinstance(weight, (int, float)) else math.nan
        part += number * logs.get(f"{name}_loss", math.nan)
    return part


def new_sums(model: keras.Model, weights: LossWeights) -> tuple[Vector | None, bool]:
    """What came to the sums of the losses in the epoch under way since the last call.

    They are those that Keras takes its averages from, or that a compound loss recorded.

    Returns:
        The sums, each loss times how much its batch counts, then those counts: a float64 array of
        shape `(K + 1,)`, None if they are not known; and whether the losses are weighted.
    """
    if weights.in_logs:
        recorded = weights.values_of_record()[: len(weights.names) + 1]
        return weights.take(total_in_fit(recorded, weights)), False
    means = {m.name: m for m in model.metrics if isinstance(m, keras.metrics.Mean)}
    keys = [f"{name}_loss" for name in weights.names]
    is_alone = len(keys) == 1 and keys[0] not in means
    keys = ["loss"] if is_alone else keys
    if not means.keys() >= set(keys):
        return None, is_alone
    variables = [*(means[key].total for key in keys), means[keys[0]].count]
    # `stack` refuses some variables of TensorFlow's.
    rows = [keras.ops.reshape(variable, (1,)) for variable in variables]
    sums = to_numpy(keras.ops.concatenate(rows)).astype(np.float64)
    return weights.take(total_in_fit(sums, weights)), is_alone


def _by_path(model: keras.Model, structure: Any) -> dict[tuple[Any, ...], Any]:
    """What `structure` has for each output, by path; that of a list is the output's name."""
    by_path = dict(keras.tree.flatten_with_path(structure))
    if isinstance(structure, (list, tuple)):
        return {(name,): by_path.get((k,)) for k, name in enumerate(model.output_names)}
    return by_path


def _output_names(model: keras.Model, weights: LossWeights) -> list[str]:
    """The outputs of `model` by the names that its losses have, as far as it knows them."""
    if isinstance(model.loss, dict):
        return list(map(_path_name, _by_path(model, model.loss)))
    if not hasattr(model, "output_names"):
        return list(weights.names)
    if isinstance(model.output, dict):
        return list(map(_path_name, _by_path(model, model.output)))
    return list(model.output_names)


def _path_name(path: tuple[Any, ...]) -> str:
    # As Keras names the losses in the logs.
    return "/".join(map(str, path))


def _compile_call(names: Iterable[str]) -> str:
    losses = ", ".join(f"{name!r}: ..." for name in names)
    return f"model.compile(..., loss={{{losses}}}, loss_weights=weighting.loss_weights)"


def own_step(model: keras.Model) -> str:
    return "train_step" if has_own(model, "train_step") else "compute_loss"


def _combine_call(model: keras.Model, weights: LossWeights) -> str:
    """The code for the terms of a `compute_loss` or `train_step` of the user's own."""
    step = own_step(model)
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
