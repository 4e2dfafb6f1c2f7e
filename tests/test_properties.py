"""Properties for any floats. `nox -s properties` tries 100,000 examples of each."""

import math
import warnings

import mpmath
import numpy as np
from common import one_backend, our_messages
from hypothesis import example, given
from hypothesis import strategies as st

from keras_dwa import DynamicWeightAverage, dwa_weights

pytestmark = one_backend

# More than a difference of two rates needs: the largest is near 1e632, the smallest 1e-632.
mpmath.mp.dps = 1300

usual = st.floats(min_value=1e-3, max_value=1e3)
finite = st.floats(allow_nan=False, allow_infinity=False) | usual
any_float = (
    st.floats()
    | st.sampled_from([0.0, -0.0, 5e-324, 1e-300, 1e300, -1e300, 3.5e38, math.nan, math.inf])
    | usual
)
temperatures = st.floats(min_value=0, exclude_min=True, allow_infinity=False) | st.floats(0.05, 20)


def vectors(values, count):
    return st.lists(values, min_size=count, max_size=count)


def exact_weights(previous, before_previous, temperature):
    """The equation, computed with 1300 digits."""
    rates = [
        mpmath.mpf(new) / mpmath.mpf(old) if old else mpmath.mpf(1)
        for new, old in zip(previous, before_previous, strict=True)
    ]
    # In float64, 1e-400 is 0.
    exponents = [max((rate - max(rates)) / temperature, -1000) for rate in rates]
    exponentials = [mpmath.exp(exponent) for exponent in exponents]
    return [float(len(rates) * value / mpmath.fsum(exponentials)) for value in exponentials]


def two_epochs(count):
    """Averages of that many losses, all with rates."""
    return st.tuples(vectors(finite, count), vectors(finite.filter(bool), count))


@given(st.integers(1, 8).flatmap(two_epochs), temperatures)
@example(([-1e300, 1e-300], [1e-300, 1e300]), 2.0)
@example(([5e-324, 0.0, -0.0], [1.7e308, 5e-324, -5e-324]), 5e-324)
# 1e17 / 3 and (1e17 + 16) / 3 differ by 16 / 3, where float64 counts in steps of 4.
@example(([1e17, 1e17 + 16], [3.0, 3.0]), 2.0)
def test_weights_are_those_of_the_equation_to_1e_12(averages, temperature):
    weights, expected = dwa_weights(*averages, temperature), exact_weights(*averages, temperature)
    np.testing.assert_allclose(weights, expected, rtol=1e-12, atol=1e-300)


def weights_by_the_table(history, temperature):
    """The weights and whether there is a warning after each epoch, by the manual's table."""
    weights, known, warned_of_sign = np.ones(len(history[0])), [], False
    for losses in history:
        warns = not np.isfinite(losses).all()
        if not warns:
            known = [*known, losses][-2:]
        if not warns and len(known) == 2:
            pairs = list(zip(*known, strict=True))
            warns = any(old == 0 != new for old, new in pairs)
            if not warns:
                weights = exact_weights(known[1], known[0], temperature)
                if not warned_of_sign:
                    warns = any(old < 0 < new or new < 0 < old for old, new in pairs)
                    warned_of_sign = warns
        yield weights, warns


def histories(count):
    """Epochs of that many losses."""
    return st.lists(vectors(any_float, count), min_size=1, max_size=6)


@given(st.integers(1, 5).flatmap(histories), st.floats(min_value=0.05, max_value=20))
@example([[1.0, 2.0], [0.5, math.nan], [0.0, 1.0], [0.5, 1.0], [-0.5, 1.0]], 2.0)
def test_whole_histories_do_what_the_table_says(epochs, temperature):
    dwa = DynamicWeightAverage([f"task_{k}" for k in range(len(epochs[0]))], temperature)
    expected = weights_by_the_table(epochs, temperature)
    for losses, (weights, warns) in zip(epochs, expected, strict=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            found = dwa.step(dict(zip(dwa.outputs, losses, strict=True)))
        assert len(our_messages(caught)) == warns
        np.testing.assert_allclose(list(found.values()), weights, rtol=1e-6, atol=1e-37)
