"""The equation, without Keras. `test_properties.py` compares it with exact numbers."""

import re
from fractions import Fraction

import numpy as np
import pytest
from common import one_backend

from keras_dwa import dwa_weights

pytestmark = one_backend

# The last epoch and the one before: rates 1/2 and 1.
EPOCHS = [1, 3], [2, 3]


def test_weights_of_the_paper_by_hand():
    # From exp(1 / 4) and exp(1 / 2).
    np.testing.assert_allclose(dwa_weights(*EPOCHS), [0.875647, 1.124353], rtol=1e-6)
    # From exp(1) and exp(2).
    weights = dwa_weights(*EPOCHS, temperature=0.5)
    np.testing.assert_allclose(weights, [0.537883, 1.462117], rtol=1e-6)


@pytest.mark.parametrize(
    ("previous", "before_previous"),
    [
        pytest.param([1.0, 2.0, 4.0], [2.0, 4.0, 8.0], id="equal_rates"),
        pytest.param([1e300, -1e300], [1e-300, -1e-300], id="equal_rates_beyond_float64"),
        pytest.param([0.0, 3.0], [0.0, 3.0], id="loss_that_is_zero_twice_has_rate_one"),
    ],
)
def test_weights_of_equal_rates_are_exactly_one(previous, before_previous):
    weights = dwa_weights(previous, before_previous)
    np.testing.assert_array_equal(weights, np.ones(len(previous)))


@pytest.mark.parametrize("kind", [np.float16, np.uint8, np.longdouble, Fraction, (10**30).__mul__])
def test_takes_real_numbers_of_any_type(kind):
    weights = dwa_weights(*(np.array([kind(value) for value in averages]) for averages in EPOCHS))
    assert weights.dtype == np.float64
    np.testing.assert_array_equal(weights, dwa_weights(*EPOCHS))


@pytest.mark.parametrize("temperature", [0, float("nan"), float("inf"), "2", 10**400])
def test_temperature_must_be_finite_and_positive(temperature):
    message = f"`temperature` must be a finite number > 0. Found `temperature = {temperature!r}`"
    with pytest.raises(ValueError, match=re.escape(message)):
        dwa_weights([1.0], [1.0], temperature)


@pytest.mark.parametrize("averages", [[], 1.0, [[1.0]], [float("nan")], [1.0, float("inf")]])
def test_averages_must_be_a_finite_vector(averages):
    found = re.escape(f"must be a vector of one or more finite numbers. Found {averages!r}")
    with pytest.raises(ValueError, match=f"`previous` {found}"):
        dwa_weights(averages, [1.0])
    with pytest.raises(ValueError, match=f"`before_previous` {found}"):
        dwa_weights([1.0], averages)


def test_averages_must_be_of_the_same_losses_and_have_rates():
    with pytest.raises(ValueError, match=r"same losses.*Found 2 and 1 values"):
        dwa_weights([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match=r"no rate. Found `previous = \[1.0, 2.0\]`"):
        dwa_weights([1.0, 2.0], [0.0, 2.0])
