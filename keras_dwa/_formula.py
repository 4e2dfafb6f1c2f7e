"""The Dynamic Weight Average equation in pure NumPy."""

import math
import numbers
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray


def dwa_weights(
    previous: ArrayLike, before_previous: ArrayLike, temperature: float = 2.0
) -> NDArray[np.float64]:
    """Computes the Dynamic Weight Average of K losses from their last two epochs.

    The slower a loss falls, the larger its weight:

        lambda_k(t) = K * exp(r_k(t-1) / T) / sum_i exp(r_i(t-1) / T)
        r_k(t-1) = L_k(t-1) / L_k(t-2)

    where

    - `L_k(t)` is loss k averaged over epoch t, before any weighting;
    - `r_k(t-1)` is its relative descending rate, small if the loss falls fast;
    - `T` is the temperature: the larger, the more uniform the weights;
    - `K` is the number of losses, and the sum of the weights.

    A loss that is 0 in both epochs has the rate 1, like any loss that does not change. Rates are
    exact fractions and cannot overflow, so the weights are always finite and >= 0.

    Args:
        previous: Averages of the last epoch, `L_k(t-1)`. Shape `(K,)`, any real dtype.
        before_previous: Averages of the epoch before, `L_k(t-2)`, in the same order.
        temperature: `T`, a finite number > 0. The paper uses 2.0.

    Returns:
        The weights `lambda_k(t)`: a float64 array of shape `(K,)`.

    Raises:
        ValueError: If the averages are not two finite vectors of the same length, if a loss was 0
            before and is not 0 now (it has no rate), or if `temperature` is invalid.

    Examples:
        >>> from keras_dwa import dwa_weights
        >>> # The second loss fell less, so it gets more weight.
        >>> dwa_weights([0.5, 0.9], [1.0, 1.0])
        array([0.90033201, 1.09966799])

    Reference:
        Liu, Johns & Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019,
        "Dynamic Weight Average".
    """
    temperature = check_temperature(temperature)
    new = _check_averages("previous", previous)
    old = _check_averages("before_previous", before_previous)
    if new.shape != old.shape:
        raise ValueError(
            "`previous` and `before_previous` must hold the same losses in the same order. "
            f"Found {new.size} and {old.size} values."
        )
    if undefined_rates(new, old).any():
        raise ValueError(
            "A loss that was 0 in the epoch before and is not 0 now has no rate. "
            f"Found `previous = {new.tolist()}`, `before_previous = {old.tolist()}`."
        )
    rates = [
        Fraction(later) / Fraction(earlier) if earlier else Fraction(1)
        for later, earlier in zip(new.tolist(), old.tolist(), strict=True)
    ]
    largest, scale = max(rates), Fraction(temperature)
    logits = [(rate - largest) / scale for rate in rates]
    # `exp` of -800 is 0 in float64. A smaller logit may be beyond its range.
    unnormalized = np.exp([float(max(logit, Fraction(-800))) for logit in logits])
    weights: NDArray[np.float64] = len(rates) * unnormalized / unnormalized.sum()
    return weights


def undefined_rates(
    previous: NDArray[np.float64], before_previous: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Which losses were 0 before and are not 0 now, so they have no rate. Shape `(K,)`."""
    undefined: NDArray[np.bool_] = (before_previous == 0) & (previous != 0)
    return undefined


def scaled_weights(
    base_weights: NDArray[np.float64], losses: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Base weights `b_k / L_k`, scaled to the sum of the `b_k`. Shape `(K,)`.

    Each loss `L_k` then has the same share of the total as `b_k` has of their sum.
    """
    weights = base_weights * (losses.min() / losses)  # Cannot overflow.
    scaled: NDArray[np.float64] = weights * (base_weights.sum() / weights.sum())
    return scaled


def check_temperature(temperature: float) -> float:
    """Returns the temperature as a float, or raises a ValueError if it is not finite and > 0."""
    if not is_positive(temperature):
        raise ValueError(
            f"`temperature` must be a finite number > 0. Found `temperature = {temperature!r}`."
        )
    return float(temperature)


def is_positive(value: object) -> bool:
    """Whether `value` is a real number that is finite and > 0 as a float."""
    try:
        return isinstance(value, numbers.Real) and 0 < float(value) < math.inf
    except OverflowError:
        return False


def _check_averages(name: str, averages: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(averages, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(
            f"`{name}` must be a vector of one or more finite numbers. Found {averages!r}."
        )
    return array
