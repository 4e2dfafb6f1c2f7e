"""Whether a model was compiled so that the loss weights reach the right losses."""

from collections.abc import Iterable, Mapping
from typing import Any

import keras

from keras_dwa._keras_internals import compiled_loss_weights
from keras_dwa.loss_weights import LossWeight


def is_compiled_with(model: keras.Model, ours: Mapping[str, LossWeight]) -> bool:
    """Whether `model` was compiled with any of our weights."""
    compiled = keras.tree.flatten(compiled_loss_weights(model))
    return any(weight is own for weight in compiled for own in ours.values())


def check_compiled(model: keras.Model, ours: Mapping[str, LossWeight]) -> None:
    """Raises a ValueError that shows the call to write, unless each loss of `model` has its weight.

    Args:
        model: a compiled model.
        ours: output name to the weight that its loss must have.
    """
    loss, loss_weights = model.loss, compiled_loss_weights(model)
    output_names = getattr(model, "output_names", list(ours))
    if loss is None:
        raise ValueError(
            f"`model` was compiled without a loss. Write\n    {_compile_call(output_names)}"
        )
    if not is_compiled_with(model, ours):
        raise ValueError(
            "`model` was not compiled with this callback's loss weights: they would have no "
            f"effect. Found `loss_weights={loss_weights}`. Write\n    {_compile_call(ours)}"
        )
    if isinstance(loss, (list, tuple)):
        raise ValueError(
            "`model` was compiled with `loss` as a list, which Keras pairs with `loss_weights` in "
            "alphabetical order of the names. Compile with a dict (a subclassed model must return "
            f"one, too):\n    {_compile_call(output_names)}"
        )
    if not isinstance(loss, dict):
        if max(len(output_names), len(ours)) > 1:
            raise ValueError(
                f"`model` was compiled with one loss, {loss!r}, for all its outputs. Compile with "
                f"a dict:\n    {_compile_call(output_names)}"
            )
        return
    losses = dict(keras.tree.flatten_with_path(loss))
    names = {path: _path_name(path) for path, value in losses.items() if value is not None}
    if set(names.values()) != set(ours):
        found = list(names.values())
        raise ValueError(
            f"`model` was compiled with losses for {found}, but the callback has the outputs "
            f"{list(ours)}. Write\n    dwa = keras_dwa.DynamicWeightAverage({found})\n"
            f"    {_compile_call(found)}"
        )
    # Keras pairs other structures by their order, which is not the same on every backend.
    weights = dict(keras.tree.flatten_with_path(loss_weights))
    if weights.keys() != losses.keys() or any(weights[p] is not ours[names[p]] for p in names):
        raise ValueError(
            f"`loss_weights={loss_weights}` must have the structure of `loss`, and each loss its "
            f"own weight. Compile with\n    loss_weights={_loss_weights_like(loss)}"
        )


def _path_name(path: tuple[Any, ...]) -> str:
    # As Keras names the losses in the logs.
    return "/".join(map(str, path))


def _compile_call(names: Iterable[str]) -> str:
    losses = ", ".join(f"{name!r}: ..." for name in names)
    return f"model.compile(..., loss={{{losses}}}, loss_weights=dwa.loss_weights)"


def _loss_weights_like(loss: Any, path: tuple[Any, ...] = ()) -> str:
    """The code for `loss_weights` in the structure of `loss`."""
    if isinstance(loss, dict):
        items = (f"{key!r}: {_loss_weights_like(loss[key], (*path, key))}" for key in loss)
        return f"{{{', '.join(items)}}}"
    return "None" if loss is None else f"dwa.loss_weights[{_path_name(path)!r}]"
