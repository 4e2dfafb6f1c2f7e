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
    weights = keras.tree.flatten(loss_weights)
    if not is_compiled_with(model, ours):
        raise ValueError(
            "`model` was not compiled with this callback's loss weights: they would have no "
            f"effect. Found `loss_weights={loss_weights}`. Write\n    {_compile_call(ours)}"
        )
    output_names = getattr(model, "output_names", list(ours))
    if isinstance(loss, (list, tuple)):
        raise ValueError(
            "`model` was compiled with `loss` as a list, which Keras pairs with `loss_weights` in "
            "alphabetical order of the names. Compile with a dict:\n"
            f"    {_compile_call(output_names)}"
        )
    if not isinstance(loss, dict):
        if len(output_names) > 1:
            raise ValueError(
                f"`model` was compiled with one loss, {loss!r}, for the outputs {output_names}. "
                f"Compile with a dict:\n    {_compile_call(output_names)}"
            )
        return
    losses = _by_path(loss)
    names = [name for name, value in losses.items() if value is not None]
    if set(names) != set(ours):
        raise ValueError(
            f"`model` was compiled with losses for {names}, but the callback has the outputs "
            f"{list(ours)}. Write\n    dwa = keras_dwa.DynamicWeightAverage({names})\n"
            f"    {_compile_call(names)}"
        )
    pairs = _as_keras_pairs(loss, loss_weights) if len(weights) == len(losses) else {}
    paired = _by_path(pairs)
    if any(paired.get(name) is not own for name, own in ours.items()):
        raise ValueError(
            f"`loss_weights={loss_weights}` does not give each loss its own weight. Compile with\n"
            f"    loss_weights={_loss_weights_like(loss)}"
        )


def _as_keras_pairs(loss: Any, loss_weights: Any) -> Any:
    # `CompileLoss.build` pairs by name, and where the structures differ by the order of flattening,
    # which sorts the names on TensorFlow and JAX but not on torch.
    try:
        keras.tree.assert_same_structure(loss, loss_weights)
    except ValueError:
        return keras.tree.pack_sequence_as(loss, keras.tree.flatten(loss_weights))
    return loss_weights


def _by_path(nested: Any) -> dict[str, Any]:
    return {_path_name(path): leaf for path, leaf in keras.tree.flatten_with_path(nested)}


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
