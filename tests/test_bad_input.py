"""What bad input gets: an error that names what was found and shows what to write, or a warning."""

import re
from contextlib import nullcontext

import numpy as np
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
    assert dwa.temperature == 0.2


@one_backend
@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "must be a sequence of one or more output names"),
        ("depth", "or a dict of name to base weight. Found `outputs = 'depth'`"),
        ({"a", "b"}, "must be a sequence"),
        (["a", "b", "a"], "would have ['a_loss', 'val_a_loss'] twice"),
        (["a", 1], "output names, or a dict of name to base weight. Found `outputs = ['a', 1]`"),
        (
            {"a": 1.0, "b": 0.0},
            "Found 0.0 for 'b'. To switch a loss off, write\n    weighting.assi",
        ),
        ({"a": float("nan")}, "Found nan for 'a'"),
        ({"a": "1"}, "Found '1' for 'a'"),
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


def test_base_weights_have_the_range_of_floatx():
    smallest, largest = float(np.finfo("float32").tiny), float(np.finfo("float32").max)
    for dtype, outputs, refused in [
        ("float32", {"a": smallest, "b": largest / 2}, None),
        ("float64", {"a": 1e300, "b": 1e-300}, None),
        ("float16", {"a": 30000.0, "b": 1.0}, None),
        ("float16", {"a": 40000.0, "b": 1.0}, "40000.0"),
        ("bfloat16", {"a": 1e38, "b": 1.0}, None),
        ("bfloat16", {"a": 2e38, "b": 1.0}, "2e+38"),
    ]:
        message = re.escape(f"within the range of {dtype}. Found {refused} for 'a'")
        with floatx(dtype), pytest.raises(ValueError, match=message) if refused else nullcontext():
            weights = DynamicWeightAverage(outputs).loss_weights
            assert {weight.dtype for weight in weights.values()} == {dtype}
            found = {name: float(weight) for name, weight in weights.items()}
            assert found == pytest.approx(outputs, rel=1e-2)


@one_backend
@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"easy": 1.0}, "needs one loss for each of ['easy', 'hard']. Found ['easy']"),
        ({"easy": 1.0, "hard": 1.0, "more": 1.0}, "Found ['easy', 'hard', 'more']"),
        ({"easy": 1.0, "hard": [1.0, 2.0]}, "scalar tensors. Found [1.0, 2.0] for 'hard'"),
        ({"easy": np.ones((1,)), "hard": 1.0}, "scalar tensors. Found array([1.]) for 'easy'"),
        ({"easy": 1j, "hard": 1.0}, "Found 1j for 'easy'"),
    ],
)
def test_step_takes_one_scalar_per_output(dwa, losses, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dwa.step(losses)
    assert dwa.step() == dwa.base_weights


# `test_properties.py` checks the weights after such losses.
@one_backend
@pytest.mark.parametrize(
    ("before", "odd", "message"),
    [
        (
            (1.0, 3.0),
            (np.nan, -np.inf),
            "'easy' (nan), 'hard' (-inf) is not finite, so the epoch is",
        ),
        ((0.0, 4.0), (0.5, 2.0), "holds the loss weights after 2 epochs: the loss of 'easy' (0.5)"),
        ((1.0, 1.0), (-1.0, 1.0), "the loss of 'easy' (-1.0) changed its sign after 2 epochs"),
    ],
)
def test_odd_average_is_warned_of_by_name_value_and_epoch(dwa, before, odd, message):
    dwa.step(dict(zip(dwa.outputs, before, strict=True)))
    with pytest.warns(UserWarning, match=re.escape(message)):
        dwa.step(dict(zip(dwa.outputs, odd, strict=True)))


@one_backend
def test_changed_sign_is_warned_of_once_until_reset(dwa):
    for _ in range(2):
        dwa.step({"easy": 1.0, "hard": 1.0})
        with pytest.warns(UserWarning, match=r"'hard' \(-1.0\) changed its sign"):
            dwa.step({"easy": 1.0, "hard": -1.0})
        dwa.step({"easy": 1.0, "hard": 1.0})
        dwa.reset()
