"""Properties for any floats at all. `nox -s properties` looks at 100,000 examples of each."""

import math
import warnings

import mpmath
import numpy as np
from common import one_backend, our_messages
from hypothesis import assume, example, given
from hypothesis import strategies as st

from keras_dwa import DynamicWeightAverage, dwa_weights

# Beyond what a difference of two rates can need: the largest is near 1e632, the smallest 1e-632.
mpmath.mp.dps = 1300

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
# Averages as they come up: exact powers of two scale them without rounding.
usual = st.floats(min_value=1e-3, max_value=1e3)
temperatures = positive | st.floats(min_value=0.05, max_value=20)


def averages(values, count):
    return st.lists(values, min_size=count, max_size=count)


def epochs(values=finite, earlier=None):
    """Two epochs of 1 to 8 losses that have rates."""
    earlier = values.filter(bool) if earlier is None else earlier
    return st.integers(1, 8).flatmap(
        lambda count: st.tuples(averages(values, count), averages(earlier, count))
    )


def exact_weights(previous, before_previous, temperature):
    """The equation in numbers of 1300 digits."""
    rates = [
        mpmath.mpf(new) / mpmath.mpf(old) if old else mpmath.mpf(1)
        for new, old in zip(previous, before_previous, strict=True)
    ]
    # From 1e-400 on, float64 has only 0.
    exponents = [max((rate - max(rates)) / temperature, -1000) for rate in rates]
    exponentials = [mpmath.exp(exponent) for exponent in exponents]
    return [float(len(rates) * value / mpmath.fsum(exponentials)) for value in exponentials]


@one_backend
@given(epochs(), temperatures)
@example(([1e300, 1e301], [1e-300, 1e-300]), 2.0)
@example(([5e-324, 0.0, -0.0], [1.7e308, 5e-324, -5e-324]), 5e-324)
def test_weights_are_those_of_the_equation_to_1e_12(averages, temperature):
    expected = exact_weights(*averages, temperature)
    np.testing.assert_allclose(dwa_weights(*averages, temperature), expected, 1e-12, atol=1e-300)


@one_backend
@given(epochs(), temperatures)
def test_weights_are_finite_never_negative_and_sum_to_their_number(averages, temperature):
    weights = dwa_weights(*averages, temperature)
    assert weights.dtype == np.float64
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(), len(weights), rtol=1e-12)


@one_backend
@given(epochs(usual), st.integers(-900, 900), st.data(), temperatures)
def test_scale_of_a_loss_does_not_matter(averages, exponent, data, temperature):
    previous, before_previous = map(np.array, averages)
    scale = np.ones(len(previous))
    scale[data.draw(st.integers(0, len(previous) - 1))] = 2.0**exponent
    scaled = dwa_weights(scale * previous, scale * before_previous, temperature)
    np.testing.assert_array_equal(scaled, dwa_weights(previous, before_previous, temperature))


@one_backend
@given(epochs(), st.randoms(), temperatures)
def test_order_of_the_losses_does_not_matter(averages, random, temperature):
    order = list(range(len(averages[0])))
    random.shuffle(order)
    permuted = dwa_weights(*(np.array(values)[order] for values in averages), temperature)
    np.testing.assert_allclose(permuted, dwa_weights(*averages, temperature)[order], rtol=1e-14)


@one_backend
@given(st.lists(st.integers(-500, 500), min_size=1, max_size=8), finite, usual, temperatures)
def test_equal_rates_give_uniform_weights(exponents, previous, before_previous, temperature):
    assume(abs(previous) < 1e150)
    assume(previous == 0 or abs(previous) > 1e-150)
    scale = 2.0 ** np.array(exponents)
    weights = dwa_weights(scale * previous, scale * before_previous, temperature)
    np.testing.assert_array_equal(weights, np.ones(len(exponents)))


@one_backend
@given(epochs(usual), usual, st.data(), temperatures)
def test_weight_grows_with_its_rate_and_the_others_fall(averages, other, data, temperature):
    previous, before_previous = map(np.array, averages)
    raised = data.draw(st.integers(0, len(previous) - 1))
    higher = previous.copy()
    higher[raised] = max(other, previous[raised])
    weights = dwa_weights(previous, before_previous, temperature)
    change = dwa_weights(higher, before_previous, temperature) - weights
    assert change[raised] >= -1e-14 * len(previous)
    assert (np.delete(change, raised) <= 1e-14 * len(previous)).all()
    rate_rises = (higher - previous)[raised] / before_previous[raised] > 1e-3
    if rate_rises and temperature < 20 and 1e-3 < weights[raised] < len(previous) - 1e-3:
        assert change[raised] > 0


@one_backend
@given(epochs(), temperatures, st.floats(min_value=1, max_value=1e6))
def test_weights_near_uniform_as_the_temperature_grows(averages, temperature, factor):
    assume(temperature * factor < math.inf)
    distances = [
        np.abs(dwa_weights(*averages, warmth) - 1).max()
        for warmth in (temperature, temperature * factor)
    ]
    assert distances[1] <= distances[0] + 1e-12


@one_backend
@given(epochs(usual))
def test_weights_are_uniform_in_the_limit_of_the_temperature(averages):
    np.testing.assert_allclose(dwa_weights(*averages, 1e12), 1, atol=1e-5)


any_float = (
    st.floats()
    | st.sampled_from([0.0, -0.0, 5e-324, 1e-300, 1e300, -1e300, 3.5e38, math.nan, math.inf])
    | usual
)
histories = st.integers(1, 5).flatmap(
    lambda count: st.tuples(
        averages(st.floats(min_value=1e-3, max_value=1e3), count),
        st.lists(averages(any_float, count), max_size=12),
    )
)


def weights_by_the_table(history, base_weights, temperature):
    """After each epoch, the weights and whether there is a warning, as the README's table says."""
    weights, known, warned_of_sign = list(base_weights), [], False
    for losses in history:
        warns = not np.isfinite(losses).all()
        if not warns:
            known = [*known, losses][-2:]
        if not warns and len(known) == 2:
            pairs = list(zip(*known, strict=True))
            warns = any(old == 0 != new for old, new in pairs)
            if not warns:
                exact = exact_weights(known[1], known[0], temperature)
                weights = [base * value for base, value in zip(base_weights, exact, strict=True)]
                if not warned_of_sign:
                    warns = any(old < 0 < new or new < 0 < old for old, new in pairs)
                    warned_of_sign = warns
        yield weights, warns


@given(histories, st.floats(min_value=0.05, max_value=20))
@example(([1.0, 1.0], [[1.0, 2.0], [0.5, math.nan], [0.0, 1.0], [0.5, 1.0], [-0.5, 1.0]]), 2.0)
def test_whole_histories_do_what_the_table_says(history, temperature):
    base_weights, losses_by_epoch = history
    names = [f"task_{k}" for k in range(len(base_weights))]
    dwa = DynamicWeightAverage(dict(zip(names, base_weights, strict=True)), temperature)
    expected = weights_by_the_table(losses_by_epoch, base_weights, temperature)
    for losses, (weights, warns) in zip(losses_by_epoch, expected, strict=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            found = dwa.step(dict(zip(names, losses, strict=True)))
        assert len(our_messages(caught)) == warns
        values = np.array([found[name] for name in names])
        assert np.isfinite(values).all()
        assert (values >= 0).all()
        np.testing.assert_allclose((values / base_weights).sum(), len(names), rtol=1e-5)
        np.testing.assert_allclose(values, weights, rtol=1e-6, atol=1e-37)
