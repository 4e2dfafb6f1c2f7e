"""The losses and loss weights that `compile` got, and problems with them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from keras_dwa._keras_internals import compiled_loss_weights, has_several_losses
from keras_dwa._loss_weights import LossWeight, as_float

Entries = Mapping[str, LossWeight]


def is_compiled_with(model: keras.Model, entries: Entries) -> bool:
    """Whether `model` was compiled with any of our weights."""
    compiled = keras.tree.flatten(compiled_loss_weights(model))
    return any(weight is own for weight in compiled for own in entries.values())


def has_own(model: keras.Model, *methods: str) -> bool:
    """Whether the class of `model` overrides any of Keras's `methods`."""
    return any(
        getattr(type(model), method) is not getattr(keras.Model, method) for method in methods
    )


def own_step(model: keras.Model) -> str:
    """The method of `model` that should call a compound loss."""
    return "train_step" if has_own(model, "train_step") else "compute_loss"


def lacks_compound_loss(model: keras.Model, has_record: bool) -> bool:
    """Whether the model's custom step needs a compound loss to use the weights."""
    return model.loss is None and not has_record and has_own(model, "train_step", "compute_loss")


def losses_problem(model: keras.Model, entries: Entries, has_record: bool) -> str | None:
    """What is wrong with the losses of `model`, if anything.

    Args:
        model: a compiled model.
        entries: output name to weight, of the callback.
        has_record: whether the callback has a compound loss.
    """
    loss, loss_weights = model.loss, compiled_loss_weights(model)
    if problem := _compound_problem(model, entries) or _one_output_problem(
        model, entries, has_record
    ):
        return problem
    if not is_compiled_with(model, entries):
        if has_record:
            return None  # The compound loss may use them.
        if lacks_compound_loss(model, has_record):
            return _combine_call(model, entries)
        if loss is None:
            return f"`model` was compiled without a loss. Write\n    {_compile_call(entries)}"
        return (
            "`model` was not compiled with this callback's loss weights, so they would have no "
            f"effect. Found `loss_weights={loss_weights}`. Write\n"
            f"    {_compile_call(entries)}\n"
            "Pass your own numbers as base weights: outputs={name: number}"
        )
    has_one = len(entries) == 1 == len(getattr(model, "output_names", entries))
    if has_one and not isinstance(loss, dict):
        return None
    if not _gives_each_output_a_loss(model):
        return (
            f"`model` needs one loss for each output, by name. Found `loss={loss!r}`. Use dicts (a "
            "subclassed model must return one, too, and nested outputs need nested dicts):\n"
            f"    {_compile_call(entries)}\n"
            "Lists work if a functional model has a list of outputs, and `loss` and `loss_weights` "
            "are both lists. (Keras pairs a list with a dict in alphabetical order of the names.)"
        )
    return _pairing_problem(model, entries)


def _gives_each_output_a_loss(model: keras.Model) -> bool:
    """Whether `loss` is a dict without lists in it, or a list in the order of the outputs."""
    if isinstance(model.loss, dict):
        paths = [path for path, _ in keras.tree.flatten_with_path(model.loss)]
        return not any(isinstance(key, int) for path in paths for key in path)
    structures = model.loss, compiled_loss_weights(model), getattr(model, "output", None)
    is_list = all(isinstance(structure, (list, tuple)) for structure in structures)
    return is_list and hasattr(model, "output_names")


def _compound_problem(model: keras.Model, entries: Entries) -> str | None:
    """What is wrong with a compound loss that `model` was compiled with, if anything."""
    losses = dict(keras.tree.flatten_with_path(model.loss))
    # Only a compound loss is also a metric.
    paths = [path for path, loss in losses.items() if isinstance(loss, keras.metrics.Metric)]
    if not paths:
        return None
    has_several = has_several_losses(model) or len(getattr(model, "output_names", ())) > 1
    if () in paths and has_several:
        return (
            "`model` has several outputs, and Keras would call the compound loss on each of them. "
            "If each output has one of its losses, write\n"
            "    model.compile(..., loss=compound.losses, loss_weights=compound.loss_weights)\n"
            "If all are for one output, write\n    model.compile(..., loss={name: compound, ...})"
        )
    loss_weights = compiled_loss_weights(model)
    weights = dict(keras.tree.flatten_with_path(loss_weights))
    # If the structures differ, Keras pairs them by order.
    has_structure = () in paths or loss_weights is None or weights.keys() == losses.keys()
    found = weights.values() if () in paths else map(weights.get, paths)
    if not has_structure or not all(weight is None or _is_one(weight) for weight in found):
        return (
            "A compound loss weights its losses itself, so its own weight in `compile` must be 1. "
            f"Found `loss_weights={loss_weights}`. Write\n"
            "    model.compile(..., loss=compound)\n"
            "and pass your numbers as base weights: outputs={name: number}. If the model has other "
            "outputs, use dicts."
        )
    if clash := [name for name in map(_path_name, losses) if name in entries and len(losses) > 1]:
        return (
            f"The compound loss has losses with the names of outputs: {clash}. Keras logs those "
            "outputs under the same names. Rename the losses."
        )
    return None


def _is_one(weight: Any) -> bool:
    return not isinstance(weight, LossWeight) and as_float(weight) == 1


def _one_output_problem(model: keras.Model, entries: Entries, has_record: bool) -> str | None:
    is_sequential = isinstance(model, keras.Sequential)
    has_one_output = is_sequential or len(getattr(model, "output_names", ())) == 1
    may_record = has_record and not is_compiled_with(model, entries)
    has_own_step = lacks_compound_loss(model, has_record)
    if may_record or has_own_step or not has_one_output or len(entries) == 1:
        return None
    return (
        f"`model` has one output, but the callback weights {list(entries)}. For several losses on "
        "one output, write\n"
        f"    compound = keras_dwa.CompoundLoss({_with_dots(entries)}, weighting)\n"
        "    model.compile(..., loss=compound)"
    )


def _pairing_problem(model: keras.Model, entries: Entries) -> str | None:
    """What is wrong with the pairing of losses and our weights, if anything."""
    loss, loss_weights = model.loss, compiled_loss_weights(model)
    losses, found = _by_path(model, loss), _by_path(model, loss_weights)
    names = {path: _path_name(path) for path, value in losses.items() if value is not None}
    fixed = _fixed(model, entries)
    outputs = [name for name in names.values() if name not in fixed]
    if set(outputs) != set(entries):
        others = [name for name in outputs if name not in entries]
        has_others = set(outputs) > set(entries)
        return (
            f"`model` was compiled with losses for {outputs}, but the callback has the outputs "
            f"{list(entries)}. Make the callback with\n    outputs={outputs}\nand write\n"
            f"    {_compile_call(outputs)}\n"
            + (
                f"or give other outputs a number: {{**weighting.loss_weights, {others[0]!r}: 0.5}}"
                if has_others
                else "If a loss term is not an output, use a compound loss for all terms."
            )
        )
    # If the structures differ, Keras pairs them by order, which depends on the backend.
    has_structure = isinstance(loss, dict) == isinstance(loss_weights, dict)
    has_structure = has_structure and found.keys() == losses.keys()
    if not has_structure or any(
        found[p] is not entries[n] for p, n in names.items() if n in entries
    ):
        return (
            f"`loss_weights` must have the structure of `loss={loss}` and give each loss its own "
            f"weight, weighting.loss_weights[name]. Found `loss_weights={loss_weights}`."
        )
    return None


def _fixed(model: keras.Model, entries: Entries) -> dict[str, Any]:
    """Output name to weight, for the losses with a weight that is not ours."""
    return {
        name: weight
        for path, weight in _by_path(model, compiled_loss_weights(model)).items()
        if (name := _path_name(path)) not in entries and not isinstance(weight, LossWeight | None)
    }


def fixed_part(
    model: keras.Model, logs: Mapping[str, float], entries: Entries, prefix: str = ""
) -> float:
    """What outputs with a weight that is not ours add to the loss; NaN if it is not a number."""
    part = 0.0
    for name, weight in _fixed(model, entries).items():
        number = weight if isinstance(weight, (int, float)) else math.nan
        part += number * logs.get(f"{prefix}{name}_loss", math.nan)
    return part


def known_rest(
    model: keras.Model, logs: Mapping[str, float], entries: Entries, prefix: str
) -> float | None:
    """The part of the total loss that we do not weight; None if it is unknown.

    Regularization is computed from the current parameters.
    """
    regularized = [v for v in model.trainable_variables if v.regularizer is not None]
    # Losses that layers add in a step have no value outside it.
    has_more = len(model.losses) != len(regularized)
    fixed = fixed_part(model, logs, entries, prefix)
    if has_more or math.isnan(fixed) or has_own(model, "compute_loss", "train_step", "test_step"):
        return None
    return fixed + sum(as_float(v.regularizer(v)) or 0.0 for v in regularized)


def _by_path(model: keras.Model, structure: Any) -> dict[tuple[Any, ...], Any]:
    """The leaves of `structure` by path. For a list, the path is the output's name."""
    by_path = dict(keras.tree.flatten_with_path(structure))
    if isinstance(structure, (list, tuple)):
        return {(name,): by_path.get((k,)) for k, name in enumerate(model.output_names)}
    return by_path


def _path_name(path: tuple[Any, ...]) -> str:
    # As Keras names the losses in the logs.
    return "/".join(map(str, path))


def _compile_call(names: Iterable[str]) -> str:
    return f"model.compile(..., loss={_with_dots(names)}, loss_weights=weighting.loss_weights)"


def _with_dots(names: Iterable[str]) -> str:
    return f"{{{', '.join(f'{name!r}: ...' for name in names)}}}"


def _combine_call(model: keras.Model, entries: Entries) -> str:
    """What to write in a model with a custom `compute_loss` or `train_step`."""
    step = own_step(model)
    if step == "train_step" and keras.backend.backend() == "jax":
        step = "compute_loss`, which `train_step` calls through `self.stateless_compute_loss"
    return (
        f"`{type(model).__name__}` has a custom `{own_step(model)}` and was compiled without a "
        "loss. Combine its losses with a compound loss. In `__init__`, write\n"
        f"    self.compound = keras_dwa.CompoundLoss({list(entries)}, weighting)\n"
        f"and in `{step}`\n    loss = self.compound.combine({_with_dots(entries)})\n"
        "If the model has a compound loss already, pass that one's `weighting` to `fit`."
    )
