"""What bad input gets: an error that names what was found and shows what to write, or a warning."""

import re
from contextlib import nullcontext

import keras
import numpy as np
import pytest
from common import floatx

from keras_dwa import DynamicWeightAverage


@pytest.fixture
def dwa():
    return DynamicWeightAverage(["easy", "hard"], temperature=0.2)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "2", None])
def test_temperature_must_be_finite_and_positive(dwa, temperature):
    found = re.escape(f"Found `temperature = {temperature!r}`")
    with pytest.raises(ValueError, match=found):
        DynamicWeightAverage(["a"], temperature)
    with pytest.raises(ValueError, match=found):
        dwa.temperature = temperature
    assert dwa.temperature == 0.2


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "must name at least one output. Found `outputs = []`"),
        ({}, "must name at least one output. Found `outputs = {}`"),
        ("depth", "must be a sequence of output names, or a dict of name to base weight. Found"),
        ({"a", "b"}, "must be a sequence"),
        (3, "Found `outputs = 3`"),
        (None, "Found `outputs = None`"),
        (["a", "b", "a"], "names 'a' more than once"),
        (["a", 1], "must hold names. Found 1 in"),
        ([b"a"], "must hold names. Found b'a' in"),
        ({"a": 1.0, None: 1.0}, "must hold names. Found None in"),
        ({"a": 0.0}, "Found 0.0 for 'a'"),
        ({"a": 1.0, "b": -2}, "Found -2 for 'b'"),
        ({"a": float("nan")}, "Found nan for 'a'"),
        ({"a": float("inf")}, "Found inf for 'a'"),
        ({"a": "1"}, "Found '1' for 'a'"),
        ({"a": None}, "Found None for 'a'"),
        # Twice this weight is infinite in float32, and this one is 0.
        ({"a": 2e38, "b": 1.0}, "stay so in float32. Found 2e+38 for 'a'"),
        ({"a": 1e-60}, "stay so in float32. Found 1e-60 for 'a'"),
        # Zero and the smallest normal number: what lies between is 0 on some devices.
        ({"a": 1e-40}, "stay so in float32. Found 1e-40 for 'a'"),
        # Names whose logs would have one key twice.
        (["x", "base"], "would have ['base_loss', 'val_base_loss'] twice"),
        (["val", "x"], "would have ['val_loss'] twice"),
        (["x", "val_base"], "would have ['val_base_loss'] twice"),
        (["x", "val_x"], "would have ['val_x_loss'] twice"),
    ],
)
def test_outputs_must_be_different_names_with_finite_positive_base_weights(outputs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DynamicWeightAverage(outputs)


def test_base_weights_cannot_be_assigned_later(dwa):
    with pytest.raises(TypeError, match="does not support item assignment"):
        dwa.outputs["easy"] = 5.0


@pytest.mark.parametrize(
    ("dtype", "outputs", "message"),
    [
        ("float32", {"a": float(np.finfo("float32").tiny), "b": 2.0**126}, None),
        ("float32", {"a": float(np.finfo("float32").max) / 2, "b": 1.0}, None),
        ("float64", {"a": 1e300, "b": 1e-300}, None),
        ("float16", {"a": 30000.0, "b": 1.0}, None),
        ("float16", {"a": 40000.0, "b": 1.0}, "stay so in float16. Found 40000.0 for 'a'"),
        ("float16", {"a": 1e-6}, "stay so in float16. Found 1e-06 for 'a'"),
        ("bfloat16", {"a": 1e38, "b": 1.0}, None),
        ("bfloat16", {"a": 2e38, "b": 1.0}, "stay so in bfloat16. Found 2e+38 for 'a'"),
    ],
)
def test_base_weights_have_the_range_of_floatx(dtype, outputs, message):
    refused = pytest.raises(ValueError, match=re.escape(message)) if message else nullcontext()
    with floatx(dtype), refused:
        weights = DynamicWeightAverage(outputs).loss_weights
        assert {weight.dtype for weight in weights.values()} == {dtype}
        found = {name: float(weight) for name, weight in weights.items()}
        assert found == pytest.approx(outputs, rel=1e-2)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"easy": 1.0}, "one loss per output of ['easy', 'hard']. Found ['easy']"),
        ({}, "Found []"),
        ({"easy": 1.0, "hard": 1.0, "more": 1.0}, "Found ['easy', 'hard', 'more']"),
        ({"easy": 1.0, "hard": [1.0, 2.0]}, "scalar tensor. Found [1.0, 2.0] for 'hard'"),
        ({"easy": np.ones((1,)), "hard": 1.0}, "scalar tensor. Found array([1.]) for 'easy'"),
        ({"easy": None, "hard": 1.0}, "Found None for 'easy'"),
        ({"easy": "1.5", "hard": 1.0}, "Found '1.5' for 'easy'"),
        ({"easy": 1j, "hard": 1.0}, "Found 1j for 'easy'"),
        ({"easy": 10**400, "hard": 1.0}, "for 'easy'"),
    ],
)
def test_step_takes_one_scalar_per_output(dwa, losses, message):
    before = dwa.step()
    with pytest.raises(ValueError, match=re.escape(message)):
        dwa.step(losses)
    assert dwa.step() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_average_that_is_not_finite_holds_the_weights_and_is_left_out(dwa, value):
    dwa.step({"easy": 2.0, "hard": 4.0})
    before = dwa.step({"easy": 1.0, "hard": 3.0})
    message = rf"holds the loss weights after 3 epochs: .* 'hard' \({value}\) is not finite"
    with pytest.warns(UserWarning, match=message):
        assert dwa.step({"easy": 0.5, "hard": value}) == before
    with pytest.warns(UserWarning, match=r"the loss of 'easy' \(nan\), 'hard' \(inf\) is not"):
        assert dwa.step({"easy": float("nan"), "hard": float("inf")}) == before
    # As if the epoch had not been: 1 -> 0.5 and 3 -> 1.5.
    np.testing.assert_allclose(dwa.step({"easy": 0.5, "hard": 1.5})["easy"], 1.0, rtol=1e-6)


def test_loss_that_is_zero_twice_has_rate_one(dwa):
    dwa.step({"easy": 0.0, "hard": 4.0})
    weights = dwa.step({"easy": 0.0, "hard": 4.0})
    np.testing.assert_allclose(weights["easy"], 1.0, rtol=1e-6)


def test_loss_that_rises_from_zero_holds_the_weights(dwa):
    dwa.step({"easy": 2.0, "hard": 4.0})
    before = dwa.step({"easy": 0.0, "hard": 4.0})
    with pytest.warns(UserWarning, match=r"holds .* after 3 epochs: .* 'easy' \(0.5\) rose from 0"):
        assert dwa.step({"easy": 0.5, "hard": 2.0}) == before
    # The next epoch has a rate again.
    np.testing.assert_allclose(dwa.step({"easy": 0.25, "hard": 1.0})["easy"], 1.0, rtol=1e-6)


def test_loss_that_changes_its_sign_follows_the_formula_with_one_warning(dwa):
    dwa.step({"easy": 1.0, "hard": 1.0})
    with pytest.warns(UserWarning, match=r"'easy' \(-1.0\) changed its sign after 2 epochs"):
        weights = dwa.step({"easy": -1.0, "hard": 1.0})
    np.testing.assert_allclose(
        weights["easy"], 2 / (1 + np.exp(2 / 0.2)), rtol=1e-6
    )  # Rates -1 and 1.
    dwa.step({"easy": 1.0, "hard": 1.0})
    dwa.reset()
    dwa.step({"easy": 1.0, "hard": 1.0})
    with pytest.warns(UserWarning, match="changed its sign"):
        dwa.step({"easy": 1.0, "hard": -1.0})


@pytest.mark.parametrize("ratio", [1e-300, 1e300])
def test_extreme_ratios_give_finite_weights(dwa, ratio):
    dwa.step({"easy": 1.0, "hard": 1.0})
    weights = dwa.step({"easy": ratio, "hard": 1.0})
    assert all(np.isfinite(weight) and weight >= 0 for weight in weights.values())
    np.testing.assert_allclose(sum(weights.values()), 2, rtol=1e-6)


def test_keras_without_the_private_attribute_is_named():
    class NoKeras:
        pass

    from keras_dwa import _keras_internals

    with pytest.raises(RuntimeError, match=rf"Keras {keras.__version__} has no `NoKeras\._comp"):
        _keras_internals.compiled_loss_weights(NoKeras())
    with pytest.raises(RuntimeError, match=rf"Keras {keras.__version__} has no `NoKeras\._trac"):
        _keras_internals.track(NoKeras(), keras.metrics.Mean())
    model = NoKeras()
    model._compile_loss = model._tracker = NoKeras()
    with pytest.raises(RuntimeError, match=r"NoKeras\._user_loss_weights"):
        _keras_internals.compiled_loss_weights(model)
    with pytest.raises(RuntimeError, match=r"NoKeras\.locked"):
        _keras_internals.track(model, keras.metrics.Mean())
