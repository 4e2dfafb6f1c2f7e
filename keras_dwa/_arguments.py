"""Checks of the arguments of a weighting, and their messages."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_dwa._backends import floatx_range
from keras_dwa._formula import is_positive
from keras_dwa._ledger import Vector
from keras_dwa._logs import check_log_names
from keras_dwa._loss_weights import as_float


def check_outputs(outputs: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Returns the base weights by output name, or raises a ValueError."""
    is_collection = isinstance(outputs, (Sequence, Mapping)) and not isinstance(outputs, str)
    names = list(outputs) if is_collection else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            "`outputs` must be a sequence of one or more output names, or a dict of name to base "
            f"weight. Found `outputs = {outputs!r}`."
        )
    base_weights = outputs if isinstance(outputs, Mapping) else dict.fromkeys(names, 1.0)
    smallest, largest = floatx_range()
    for name, base_weight in base_weights.items():
        # The factors of most rules reach the number of outputs.
        if not is_positive(base_weight) or not smallest <= base_weight <= largest / len(names):
            raise ValueError(
                "A base weight must be a finite number > 0, well within the range of "
                f"{keras.config.floatx()}. Found {base_weight!r} for {name!r}. To switch a loss "
                f"off, write\n    weighting.assign({{{name!r}: 0.0}})\nTo maximize a term, such as "
                "an entropy, negate it."
            )
    check_log_names(names)
    return {name: float(base_weight) for name, base_weight in base_weights.items()}


def check_update_freq(update_freq: Any) -> Any:
    """Returns `update_freq`, or raises a ValueError."""
    is_number = isinstance(update_freq, numbers.Integral) and not isinstance(update_freq, bool)
    if update_freq != "epoch" and not (is_number and update_freq > 0):
        raise ValueError(
            "`update_freq` must be 'epoch', or a whole number of batches > 0. Found "
            f"`update_freq = {update_freq!r}`."
        )
    return update_freq


def check_factors(
    found: Any, present: Mapping[str, float], base_weights: Mapping[str, float], source: str
) -> Vector:
    """Returns the present factors, updated by those found, or raises a ValueError.

    Args:
        found: a mapping of output name to factor.
        present: output name to factor.
        base_weights: output name to base weight.
        source: where `found` comes from, for the message.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{source}: expected a dict of name to factor. Found {found!r}.")
    factors: dict[str, float | None] = {name: present[name] for name in base_weights}
    if unknown := [name for name in found if name not in factors]:
        raise ValueError(f"{source}: found {unknown}. The outputs are {list(factors)}.")
    factors.update({name: as_float(value) for name, value in found.items()})
    _, largest = floatx_range()
    for name, base_weight in base_weights.items():
        factor = factors[name]
        if factor is None or not 0 <= factor * base_weight <= largest:
            raise ValueError(
                f"{source}: found {found.get(name, factor)!r} for {name!r}. A factor must be a "
                "finite number >= 0, and so must its product with the base weight, in "
                f"{keras.config.floatx()}."
            )
    return np.array(list(factors.values()))


def check_losses(losses: Mapping[str, Any], names: Sequence[str], method: str) -> Vector:
    """Returns the averages passed to a method in the order of `names`: float64, shape `(K,)`."""
    if set(losses) != set(names):
        raise ValueError(
            f"`{method}` needs one loss for each of {list(names)}. Found {list(losses)}."
        )
    averages = [as_float(losses[name]) for name in names]
    if None in averages:
        name = names[averages.index(None)]
        raise ValueError(
            f"`{method}` needs averages that are real numbers or scalar tensors. Found "
            f"{losses[name]!r} for {name!r}."
        )
    return np.array(averages, dtype=np.float64)


def check_scale(losses: Mapping[str, float]) -> None:
    """Raises a ValueError unless base weights can be divided by the losses."""
    for name, loss in losses.items():
        if not 0 < loss < math.inf:
            raise ValueError(
                "`adapt` divides by each loss, which must be a finite number > 0. Found "
                f"{loss} for {name!r}. (It is nan if `evaluate` does not compute it.) Pass typical "
                "averages:\n"
                f"    weighting.adapt({{{', '.join(f'{name!r}: ...' for name in losses)}}})"
            )


def check_memory(memory: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns what a rule remembers as arrays that can be saved, or raises a ValueError."""
    arrays = {}
    for name, value in memory.items():
        try:
            arrays[name] = np.asarray(value)
        except ValueError:  # Lists of different lengths.
            arrays[name] = np.array(None)
    for name, array in arrays.items():
        if not isinstance(name, str) or array.dtype.kind not in "biufc":
            raise ValueError(
                f"{source}: found {memory[name]!r} in `state[{name!r}]`. `state` must map strings "
                "to arrays of numbers."
            )
    return arrays
