"""What bad input gets: an error that names what was found and shows what to write, or a warning."""

import re

import pytest
from common import floatx, one_backend

from keras_dwa import DynamicWeightAverage


# `test_formula.py` has more cases.
@one_backend
def test_temperature_must_be_finite_and_positive_at_first_and_later(dwa):
    with pytest.raises(ValueError, match="Found `temperature = 0`"):
        DynamicWeightAverage(["a"], 0)
    with pytest.raises(ValueError, match="Found `temperature = '2'`"):
        dwa.temperature = "2"


@one_backend
@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "must be a sequence of one or more output names"),
        ("depth", "or a dict of name to base weight. Found `outputs = 'depth'`"),
        (["a", 1], "Found `outputs = ['a', 1]`"),
        ({"a": 0.0}, "Found 0.0 for 'a'. To switch a loss off, write\n    weighting.assi"),
        # Twice this weight is infinite in float32.
        ({"a": 2e38, "b": 1.0}, "within the range of float32. Found 2e+38 for 'a'"),
        # Below the smallest normal number: it is 0 on some devices.
        ({"a": 1e-40}, "within the range of float32. Found 1e-40 for 'a'"),
        # Names that would appear twice in the logs.
        (["x", "base"], "would have ['base_loss', 'val_base_loss'] twice"),
        (["val", "x"], "would have ['val_loss'] twice"),
        (["x", "val_x"], "would have ['val_x_loss'] twice"),
    ],
)
def test_outputs_must_be_different_names_with_finite_positive_base_weights(outputs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DynamicWeightAverage(outputs)


@one_backend
def test_base_weights_and_state_cannot_be_assigned(dwa):
    for shown in (dwa.base_weights, dwa.state):
        with pytest.raises(TypeError, match="does not support item assignment"):
            shown["easy"] = 5.0


@pytest.mark.parametrize(
    ("dtype", "largest", "refused"),
    [("float64", 1e300, None), ("float16", 3e4, 4e4), ("bfloat16", 1e38, 2e38)],
)
def test_base_weights_have_the_range_of_floatx(dtype, largest, refused):
    with floatx(dtype):
        weight = DynamicWeightAverage({"a": largest, "b": 1.0}).loss_weights["a"]
        assert weight.dtype == dtype
        assert float(weight) == pytest.approx(largest, rel=1e-2)
        if refused:
            with pytest.raises(ValueError, match=f"within the range of {dtype}. Found"):
                DynamicWeightAverage({"a": refused, "b": 1.0})


@one_backend
@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"easy": 1.0}, "needs one loss for each of ['easy', 'hard']. Found ['easy']"),
        ({"easy": 1.0, "hard": [1.0, 2.0]}, "scalar tensors. Found [1.0, 2.0] for 'hard'"),
        ({"easy": 1j, "hard": 1.0}, "Found 1j for 'easy'"),
    ],
)
def test_step_takes_one_scalar_per_output(dwa, losses, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dwa.step(losses)
    assert dwa.step() == dwa.base_weights


# `test_properties.py` checks the weights after such losses.
@one_backend
def test_loss_that_was_zero_is_warned_of_by_name_value_and_epoch(dwa):
    dwa.step({"easy": 0.0, "hard": 4.0})
    with pytest.warns(UserWarning, match=r"after 2 epochs: the loss of 'easy' \(0\.5\) was 0"):
        dwa.step({"easy": 0.5, "hard": 2.0})


@one_backend
def test_changed_sign_is_warned_of_once_until_reset(dwa):
    for _ in range(2):
        dwa.step({"easy": 1.0, "hard": 1.0})
        with pytest.warns(UserWarning, match=r"'hard' \(-1.0\) changed its sign after 2 epochs"):
            dwa.step({"easy": 1.0, "hard": -1.0})
        dwa.step({"easy": 1.0, "hard": 1.0})
        dwa.reset()
