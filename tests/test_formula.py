"""The equation, with nothing of Keras."""

from fractions import Fraction

import numpy as np
import pytest
from common import one_backend

from keras_dwa import dwa_weights

pytestmark = one_backend


def test_weights_of_the_paper_by_hand():
    # Rates 1/2 and 1, T = 2: exp(0.25) and exp(0.5).
    np.testing.assert_allclose(dwa_weights([1.0, 3.0], [2.0, 3.0]), [0.875647, 1.124353], rtol=1e-6)


def test_temperature_divides_the_rates():
    # Rates 1/2 and 1, T = 1/2: exp(1) and exp(2).
    np.testing.assert_allclose(
        dwa_weights([1.0, 3.0], [2.0, 3.0], temperature=0.5), [0.537883, 1.462117], rtol=1e-6
    )


def test_slowest_falling_loss_gets_the_largest_weight():
    weights = dwa_weights([0.9, 0.5, 1.2], [1.0, 1.0, 1.0])
    assert weights[1] < weights[0] < weights[2]


def test_equal_rates_give_uniform_weights():
    np.testing.assert_array_equal(dwa_weights([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]), [1, 1, 1])


def test_single_loss_has_weight_one():
    np.testing.assert_array_equal(dwa_weights([0.1], [7.0]), [1.0])


def test_negative_losses_follow_the_formula():
    np.testing.assert_allclose(
        dwa_weights([-1.0, 3.0], [-2.0, 3.0]), dwa_weights([1.0, 3.0], [2.0, 3.0])
    )


def test_loss_that_is_zero_twice_has_rate_one():
    np.testing.assert_array_equal(dwa_weights([0.0, 3.0], [0.0, 3.0]), [1.0, 1.0])


def test_rates_beyond_the_range_of_float64_are_told_apart():
    np.testing.assert_array_equal(dwa_weights([1e300, 1e301], [1e-300, 1e-300]), [0.0, 2.0])
    np.testing.assert_array_equal(dwa_weights([1e300, 1e300], [1e-300, 1e-300]), [1.0, 1.0])
    np.testing.assert_array_equal(dwa_weights([-1e300, 1e-300], [1e-300, 1e300]), [0.0, 2.0])


def test_rates_that_float64_rounds_to_one_number_are_told_apart():
    # 1e17 / 3 and (1e17 + 16) / 3 differ by 16 / 3, where float64 counts in steps of 4 or 8.
    rounded = dwa_weights([1e17, 1e17 + 16], [3.0, 3.0])
    np.testing.assert_allclose(rounded[1] / rounded[0], np.exp(16 / 3 / 2), rtol=1e-12)


def test_takes_and_leaves_numpy_arrays():
    previous = np.array([1, 3], dtype="int32")
    assert isinstance(dwa_weights(previous, np.float32([2, 3])), np.ndarray)
    np.testing.assert_array_equal(previous, [1, 3])


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "uint8", "longdouble", object])
def test_takes_real_numbers_of_any_type(dtype):
    previous, before_previous = np.array([1, 3]).astype(dtype), np.array([2, 3]).astype(dtype)
    np.testing.assert_array_equal(
        dwa_weights(previous, before_previous), dwa_weights([1.0, 3.0], [2.0, 3.0])
    )


def test_takes_numbers_that_numpy_has_no_type_for():
    weights = dwa_weights([10**30, Fraction(3, 2)], [2 * 10**30, Fraction(3, 2)])
    np.testing.assert_array_equal(weights, dwa_weights([1e30, 1.5], [2e30, 1.5]))


@pytest.mark.parametrize(
    "temperature", [0, 0.0, -1.0, float("nan"), float("inf"), -float("inf"), "2", None, 10**400]
)
def test_temperature_must_be_finite_and_positive(temperature):
    with pytest.raises(ValueError, match="`temperature` must be a finite number > 0") as error:
        dwa_weights([1.0], [1.0], temperature)
    assert f"Found `temperature = {temperature!r}`" in str(error.value)


def test_different_numbers_of_losses_are_refused():
    with pytest.raises(ValueError, match=r"same losses.*Found 2 and 1 values"):
        dwa_weights([1.0, 2.0], [1.0])


@pytest.mark.parametrize("averages", [[], 1.0, [[1.0]], [float("nan")], [1.0, float("inf")]])
def test_averages_must_be_a_finite_vector(averages):
    with pytest.raises(ValueError, match="`previous` must be a vector"):
        dwa_weights(averages, [1.0])
    with pytest.raises(ValueError, match="`before_previous` must be a vector"):
        dwa_weights([1.0], averages)


def test_loss_that_rises_from_zero_has_no_rate():
    with pytest.raises(ValueError, match=r"no rate. Found `previous = \[1.0, 2.0\]`"):
        dwa_weights([1.0, 2.0], [0.0, 2.0])
