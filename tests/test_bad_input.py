"""What bad input gets: an error that names what was found and shows what to write, or a warning."""

import re

import keras
import numpy as np
import pytest
from common import BACKEND, LOSSES, X, Y, dict_model, heads, train

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
    ],
)
def test_outputs_must_be_different_names_with_finite_positive_base_weights(outputs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DynamicWeightAverage(outputs)


def compiled(model, loss, loss_weights):
    model.compile(optimizer="sgd", loss=loss, loss_weights=loss_weights)
    return model


def list_model():
    inputs, outputs = heads()
    return keras.Model(inputs, [outputs["hard"], outputs["easy"]])


def check_refused(model, dwa, message, y=Y):
    """`fit` raises before the first step."""
    before = model.get_weights()
    with pytest.raises(ValueError, match=re.escape(message)):
        model.fit(X, y, verbose=0, callbacks=[dwa])
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


TO_WRITE = "model.compile(..., loss={'easy': ..., 'hard': ...}, loss_weights=dwa.loss_weights)"


def test_model_compiled_without_loss_weights_is_refused(dwa):
    message = f"Found `loss_weights=None`. Write\n    {TO_WRITE}"
    check_refused(compiled(dict_model(), LOSSES, None), dwa, message)


def test_model_compiled_with_plain_floats_is_refused(dwa):
    weights = {"easy": 1.0, "hard": 2.0}
    message = f"Found `loss_weights={weights}`. Write\n    {TO_WRITE}"
    check_refused(compiled(dict_model(), LOSSES, weights), dwa, message)


def test_model_compiled_with_another_callbacks_weights_is_refused(dwa):
    other = DynamicWeightAverage(["easy", "hard"])
    check_refused(compiled(dict_model(), LOSSES, other.loss_weights), dwa, TO_WRITE)


def test_model_compiled_without_a_loss_is_refused(dwa):
    model = dict_model()
    model.compile(optimizer="sgd")
    with pytest.raises(
        ValueError, match="compiled without a loss. Write\n" + re.escape(f"    {TO_WRITE}")
    ):
        dwa.set_model(model)


def test_model_compiled_anew_without_the_weights_is_refused(dwa):
    model = dict_model()
    train(model, dwa, epochs=1)
    check_refused(compiled(model, LOSSES, None), dwa, TO_WRITE)


def test_list_of_losses_is_refused_with_the_dict_to_write(dwa):
    model = compiled(list_model(), ["mae", "mse"], dwa.loss_weights)
    message = (
        "`loss` as a list, which Keras pairs with `loss_weights` in alphabetical order of the "
        "names. Compile with a dict (a subclassed model must return one, too):\n"
        "    model.compile(..., loss={'hard': ..., 'easy': ...}, loss_weights=dwa.loss_weights)"
    )
    check_refused(model, dwa, message, [Y["hard"], Y["easy"]])


def test_one_loss_for_all_outputs_is_refused():
    dwa = DynamicWeightAverage(["easy"])
    model = compiled(dict_model(), "mse", dwa.loss_weights)
    check_refused(
        model, dwa, "one loss, 'mse', for all its outputs. Compile with a dict:\n    model"
    )


def test_other_names_than_the_losses_are_refused():
    dwa = DynamicWeightAverage(["easy", "heavy"])
    message = (
        "losses for ['easy', 'hard'], but the callback has the outputs ['easy', 'heavy']. Write\n"
        f"    dwa = keras_dwa.DynamicWeightAverage(['easy', 'hard'])\n    {TO_WRITE}"
    )
    check_refused(compiled(dict_model(), LOSSES, dwa.loss_weights), dwa, message)


@pytest.mark.parametrize("names", [["easy"], ["easy", "hard", "third"]])
def test_too_few_or_too_many_names_are_refused(names):
    dwa = DynamicWeightAverage(names)
    message = "the callback has the outputs"
    if BACKEND != "tensorflow":
        # Keras counts losses and weights before it shows the model to a callback.
        message = f"must match the number of losses, got 2 losses and {len(names)} weights"
    check_refused(compiled(dict_model(), LOSSES, dwa.loss_weights), dwa, message)


def test_weights_swapped_by_hand_are_refused(dwa):
    swapped = {"easy": dwa.loss_weights["hard"], "hard": dwa.loss_weights["easy"]}
    to_write = "loss_weights={'easy': dwa.loss_weights['easy'], 'hard': dwa.loss_weights['hard']}"
    check_refused(compiled(dict_model(), LOSSES, swapped), dwa, to_write)


def test_flat_weights_of_nested_losses_are_refused_with_the_structure_to_write():
    inputs, outputs = heads()
    # Flattened, "a" comes before "a-b"; as paths, "a-b" comes before "a/easy".
    model = keras.Model(inputs, {"a": {"easy": outputs["easy"]}, "a-b": outputs["hard"]})
    targets = {"a": {"easy": Y["easy"]}, "a-b": Y["hard"]}
    losses = {"a": {"easy": "mse"}, "a-b": "mae"}
    dwa = DynamicWeightAverage(["a/easy", "a-b"])
    to_write = (
        "loss_weights={'a': {'easy': dwa.loss_weights['a/easy']}, 'a-b': dwa.loss_weights['a-b']}"
    )
    check_refused(compiled(model, losses, dwa.loss_weights), dwa, to_write, targets)


def test_list_of_weights_is_refused(dwa):
    # Keras pairs it with the outputs in the model's order, not in that of the loss dict.
    weights = [dwa.loss_weights["easy"], dwa.loss_weights["hard"]]
    model = compiled(list_model(), LOSSES, weights)
    to_write = "loss_weights={'easy': dwa.loss_weights['easy'], 'hard': dwa.loss_weights['hard']}"
    check_refused(model, dwa, to_write, [Y["hard"], Y["easy"]])


class OwnMetrics(keras.Model):
    @property
    def metrics(self):
        return []


def test_metrics_that_hide_the_weights_from_the_step_are_refused(dwa):
    model = compiled(OwnMetrics(*heads()), LOSSES, dwa.loss_weights)
    check_refused(model, dwa, "`OwnMetrics.metrics` hides the loss weights")


def test_attribute_that_is_taken_is_refused(dwa):
    model = compiled(dict_model(), LOSSES, dwa.loss_weights)
    model.dynamic_weight_average = "mine"
    check_refused(model, dwa, "`model.dynamic_weight_average` is taken")
    assert model.dynamic_weight_average == "mine"


def test_same_callback_twice_is_an_error(dwa):
    model = compiled(dict_model(), LOSSES, dwa.loss_weights)
    with pytest.raises(ValueError, match=r"\['easy_weight'.* already.* to `fit` once only"):
        model.fit(X, Y, verbose=0, callbacks=[dwa, dwa])


def test_output_whose_loss_would_be_overwritten_is_an_error():
    inputs, outputs = heads()
    model = keras.Model(inputs, {"base": outputs["easy"], "hard": outputs["hard"]})
    dwa = DynamicWeightAverage(["base", "hard"])
    compiled(model, {"base": "mse", "hard": "mae"}, dwa.loss_weights)
    with pytest.raises(ValueError, match=r"`logs` has \['base_loss'\] already"):
        model.fit(X, {"base": Y["easy"], "hard": Y["hard"]}, verbose=0, callbacks=[dwa])


def test_logs_without_an_outputs_loss_are_refused(dwa):
    class OwnStep(keras.Model):
        def get_metrics_result(self):
            results = super().get_metrics_result()
            return {"loss": results["loss"], "mine": results["easy_loss"]}

    model = compiled(OwnStep(*heads()), LOSSES, dwa.loss_weights)
    message = (
        r"lacks \['easy_loss', 'hard_loss'\].*It has \['loss', 'mine'\].*self\.compute_metrics"
    )
    with pytest.raises(ValueError, match=message):
        model.fit(X, Y, verbose=0, callbacks=[dwa])


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
