"""Whether the loss weights reach the right losses, and the logs the right reader."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

from keras_dwa._keras_internals import compiled_loss_weights
from keras_dwa.loss_weights import LossWeight, LossWeights


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
            f"`model` was compiled without a loss. Write\n    {_compile_call(output_names)}\n"
            "If it calls a compound loss, pass the callback that has it."
        )
    if not is_compiled_with(model, ours):
        raise ValueError(
            "`model` was not compiled with this callback's loss weights: they would have no "
            f"effect. Found `loss_weights={loss_weights}`. Write\n    {_compile_call(ours)}\n"
            "Factors of your own are base weights: keras_dwa.DynamicWeightAverage({name: factor})"
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
    if any(isinstance(key, int) for path in losses for key in path):
        raise ValueError(
            f"`model` was compiled with a list within `loss={loss}`. Write each loss by itself, "
            "and give a model with nested outputs dicts of them:\n"
            "    loss={'depth': 'mae', 'heads': {'left': 'mse', 'right': 'mse'}}"
        )
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


def check_distribution(state: LossWeights) -> None:
    """Raises a ValueError if JAX would refuse the weights together with a distributed model."""
    distribution = keras.distribution.distribution()
    if keras.backend.backend() == "jax" and distribution is not None and not state.is_distributed:
        raise ValueError(
            f"The callback was made before the distribution was set. Found {distribution}. Write\n"
            "    keras.distribution.set_distribution(...)\n"
            f"    dwa = keras_dwa.DynamicWeightAverage({list(state.weights)})"
        )


def check_log_names(names: Sequence[str]) -> None:
    """Raises a ValueError if two logs of outputs with these names would have the same key."""
    keys = Counter(["val_loss", "base_loss", "val_base_loss"])
    keys.update(f"{prefix}{name}_loss" for name in names for prefix in ("", "val_"))
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ValueError(
            f"The logs of outputs with these names would have {twice} twice: Keras logs "
            "`<name>_loss` and `val_<name>_loss`, and DynamicWeightAverage `base_loss`. Rename an "
            f"output. Found {list(names)}."
        )


def check_metrics(model: keras.Model, state: LossWeights) -> None:
    """Raises a ValueError if the logs of an output's loss would be those of another metric."""
    keys = Counter(metric.name for metric in model.metrics)
    # One is Keras's own for a loss in `compile`; a compound loss has `state`, of another name.
    expected = 0 if state.in_logs else 1
    taken = [key for name in state.weights if keys[key := f"{name}_loss"] > expected]
    if taken and state.in_logs:
        raise ValueError(
            f"`model` has metrics named {taken}, which would replace the losses that the compound "
            "loss logs by itself. Leave them out; or, for losses in `compile`, write\n"
            "    model.compile(..., loss=compound.losses, loss_weights=compound.loss_weights)"
        )
    if taken:
        raise ValueError(
            f"`model` has other metrics named {taken}, which would replace the outputs' losses in "
            f"the logs. Give them other names:\n    keras.metrics.Mean(name='my_{taken[0]}')"
        )


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
    return f"model.compile(..., loss={{{losses}}}, loss_weights=dwa.loss_weights)"


def _loss_weights_like(loss: Any, path: tuple[Any, ...] = ()) -> str:
    """The code for `loss_weights` in the structure of `loss`."""
    if isinstance(loss, dict):
        items = (f"{key!r}: {_loss_weights_like(loss[key], (*path, key))}" for key in loss)
        return f"{{{', '.join(items)}}}"
    return "None" if loss is None else f"dwa.loss_weights[{_path_name(path)!r}]"
