"""`adapt` scales base weights to the losses."""

import math
import pickle
from functools import partial

import keras
import numpy as np
import pytest
from common import (
    MODES,
    NAMES,
    ComputeLoss,
    Lambda,
    TwoHeads,
    X,
    Y,
    check_base_loss,
    check_run,
    compiled,
    deep_elsewhere,
    dict_model,
    fit,
    one_backend,
    train,
)
from test_own_steps import NAMES as VAE_NAMES
from test_own_steps import VAE

from keras_dwa import DynamicWeightAverage, LossWeighting, LossWeightScheduler

# Makes the scales of the two losses differ.
FAR = {"easy": 10 * Y["easy"], "hard": Y["hard"]}


@keras.saving.register_keras_serializable("tests")
class Noise(keras.layers.Layer):
    """Also draws random numbers in an evaluation."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(0)

    def call(self, inputs):
        return inputs + 0.01 * keras.random.normal(keras.ops.shape(inputs), seed=self.seed)


def shares(logs, weighting):
    """The share of each loss in the total, from the logs of an evaluation or epoch."""
    parts = {n: weighting.base_weights[n] * logs[f"{n}_loss"] for n in weighting.outputs}
    return {name: part / sum(parts.values()) for name, part in parts.items()}


def test_each_loss_starts_with_its_share_and_the_weights_reach_the_step(mode):
    dwa = DynamicWeightAverage({"easy": 3.0, "hard": 1.0}, temperature=0.2)
    model = compiled(dict_model(), dwa, 0.001, **mode)
    dwa.adapt(model, X, FAR, batch_size=8)
    assert sum(dwa.base_weights.values()) == pytest.approx(4)
    assert dwa.base_weights["easy"] < 1
    logs = model.evaluate(X, FAR, batch_size=8, verbose=0, return_dict=True)
    assert shares(logs, dwa) == pytest.approx({"easy": 0.75, "hard": 0.25}, rel=1e-5)
    check_run(fit(model, dwa, y=FAR, epochs=4, validation_data=(X, FAR)), dwa)


def noisy_model():
    inputs = keras.Input((4,))
    features = keras.layers.BatchNormalization()(keras.layers.Dense(6)(Noise()(inputs)))
    features = keras.layers.Dropout(0.2)(features)
    easy = keras.layers.Dense(1, name="easy")(features)
    return keras.Model(inputs, {"easy": easy, "hard": keras.layers.Dense(2, name="hard")(features)})


@pytest.mark.parametrize("eager", [False, True] if "eager" in MODES else [False])
def test_nothing_else_moves(eager):
    def trained(adapts):
        keras.utils.set_random_seed(0)
        dwa = DynamicWeightAverage(NAMES)
        model = compiled(noisy_model(), dwa, 0.001, run_eagerly=eager, metrics={"easy": ["mae"]})
        model.train_on_batch(X[:8], {name: target[:8] for name, target in Y.items()})
        before = {metric.name: np.array(metric.variables) for metric in model.metrics}
        if adapts:
            dwa.adapt(model, X, FAR)
        metrics = {metric.name: metric for metric in model.metrics}
        for name, values in before.items():
            np.testing.assert_array_equal(metrics[name].variables, values)
        dwa.adapt({"easy": 1.0, "hard": 1.0})
        return fit(model, dwa, epochs=2), model.get_weights()

    (history, parameters), (expected_history, expected) = trained(True), trained(False)
    assert history == expected_history
    for found, value in zip(parameters, expected, strict=True):
        np.testing.assert_array_equal(found, value)


def test_evaluation_that_fails_changes_nothing():
    dwa = DynamicWeightAverage(NAMES)
    model = compiled(noisy_model(), dwa)
    fit(model, dwa, epochs=1)
    before = [keras.ops.convert_to_numpy(variable).copy() for variable in model.variables]

    def interrupt(batch, logs):
        if batch == 3:
            raise KeyboardInterrupt

    calls = [(None, []), ({"easy": Y["easy"]}, [])]
    # After an interruption, Keras 3.10 makes a thread wait for itself.
    if not keras.__version__.startswith("3.10."):
        calls.append((Y, [Lambda(on_test_batch_begin=interrupt)]))
    for y, callbacks in calls:
        with pytest.raises((ValueError, KeyError, KeyboardInterrupt)):
            dwa.adapt(model, X, y, batch_size=8, callbacks=callbacks)
        for variable, value in zip(model.variables, before, strict=True):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    assert dwa.base_weights == {"easy": 1.0, "hard": 1.0}
    check_run(fit(model, dwa, epochs=1), dwa)


@one_backend
def test_weights_given_as_constants_to_the_loss_are_noticed_after_adapting():
    class Constants(TwoHeads):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            super().compute_loss(x, y, y_pred, sample_weight)
            easy = keras.ops.mean(keras.ops.square(y["easy"] - y_pred["easy"]))
            return 3 * easy + keras.ops.mean(keras.ops.abs(y["hard"] - y_pred["hard"]))

    dwa = DynamicWeightAverage({"easy": 3.0, "hard": 1.0})
    model = compiled(Constants(), dwa)
    dwa.adapt(model, X, FAR)
    with pytest.raises(ValueError, match=r"With the weights .* the sum under the base weights"):
        fit(model, dwa, y=FAR)


@one_backend
def test_adapting_within_an_epoch_loses_no_batch_of_a_window():
    dwa = DynamicWeightAverage(NAMES, update_freq=2)
    model = compiled(dict_model(), dwa, 0.001)
    adapt = Lambda(on_train_batch_begin=lambda batch, logs: batch == 3 and dwa.adapt(model, X, FAR))
    history = fit(model, dwa, adapt, y=FAR, epochs=1)
    assert [window.batches for window in dwa.windows] == [2, 2]
    total = sum(history[f"{name}_weight"][0] * history[f"{name}_loss"][0] for name in NAMES)
    assert total != pytest.approx(history["loss"][0])  # The weights moved within the epoch.
    check_base_loss(history, dwa.base_weights)


@one_backend
def test_adapting_again_replaces_the_scale_and_a_reset_or_another_model_keeps_it():
    dwa = DynamicWeightAverage({"easy": 2.0, "hard": 1.0})
    dwa.adapt({"easy": 7.0, "hard": 0.1})
    dwa.adapt({"easy": 4.0, "hard": 1.0})
    expected = {"easy": 1.0, "hard": 2.0}
    assert dwa.base_weights == pytest.approx(expected)
    dwa.reset()
    for _ in range(2):
        check_run(train(dict_model(), dwa, epochs=1), dwa)
        assert dwa.base_weights == pytest.approx(expected)
    assert dwa.get_config()["outputs"] == {"easy": 2.0, "hard": 1.0}
    assert "'easy': 1.0, 'hard': 2.0" in repr(dwa)


@one_backend
def test_the_scale_comes_with_files_and_pickles_under_other_given_base_weights_too(tmp_path):
    dwa = DynamicWeightAverage(NAMES)
    dwa.adapt({"easy": 3.0, "hard": 1.0})
    model = dict_model()
    train(model, dwa, epochs=1)
    path = tmp_path / "file.weights.h5"
    model.save_weights(path)
    # The same outputs in another order.
    for easy, expected in ((1.0, (1.5, 0.5)), (3.0, (2.0, 2.0))):
        other = DynamicWeightAverage({"hard": 1.0, "easy": easy})
        resumed = compiled(dict_model(), other)
        other.set_model(resumed)
        resumed.load_weights(path)
        assert list(other.base_weights.values()) == pytest.approx(expected)
    assert pickle.loads(pickle.dumps(dwa)).base_weights == dwa.base_weights


@pytest.mark.parametrize(
    ("make_model", "names", "data"),
    [(ComputeLoss, NAMES, (X, FAR)), (partial(VAE, tracked=["kl"]), VAE_NAMES, (X, None))],
)
def test_compound_loss_and_own_trackers_adapt_to_losses_of_an_evaluation(make_model, names, data):
    dwa = DynamicWeightAverage({names[0]: 1.0, names[1]: 3.0})
    model = make_model(dwa)
    model.compile(keras.optimizers.SGD(0.001))
    for _ in range(2):  # Before and after a `fit`.
        dwa.adapt(model, *data, batch_size=8)
        logs = model.evaluate(*data, batch_size=8, verbose=0, return_dict=True)
        assert list(shares(logs, dwa).values()) == pytest.approx([0.25, 0.75], rel=1e-5)
        history = fit(model, dwa, y=data[1], batch_size=8, epochs=1)
        check_base_loss(history, dwa.base_weights)
        assert history["loss"] == pytest.approx(history["base_loss"], rel=1e-5)


@deep_elsewhere
def test_takes_data_as_evaluate_does():
    dwa = DynamicWeightAverage(NAMES)
    model = compiled(dict_model(), dwa)
    dwa.adapt(model, X, FAR, batch_size=8)
    expected = dwa.base_weights
    batches = (slice(start, start + 8) for start in range(0, 40, 8))
    dwa.adapt(model, ((X[b], {name: FAR[name][b] for name in NAMES}) for b in batches), steps=5)
    assert dwa.base_weights == pytest.approx(expected, rel=1e-5)
    halves = {"easy": np.full(40, 0.5), "hard": np.ones(40)}
    dwa.adapt(model, X, FAR, batch_size=8, sample_weight=halves)
    ratio = dwa.base_weights["easy"] / dwa.base_weights["hard"]
    assert ratio == pytest.approx(2 * expected["easy"] / expected["hard"], rel=1e-5)


@one_backend
def test_schedules_and_factors_multiply_the_scaled_base_weights():
    weighting = LossWeightScheduler(NAMES, lambda epoch, factors: {"easy": 0.5 * (epoch + 1)})
    weighting.adapt({"easy": 3.0, "hard": 1.0})
    history = train(dict_model(), weighting, epochs=2)
    assert history["easy_weight"] == pytest.approx([0.25, 0.5])
    assert history["hard_weight"] == pytest.approx([1.5, 1.5])
    check_base_loss(history, {"easy": 0.5, "hard": 1.5})


@one_backend
@pytest.mark.parametrize("loss", [0.0, -1.0, math.nan, math.inf])
def test_a_loss_that_is_not_finite_and_positive_is_named_and_changes_nothing(loss):
    dwa = DynamicWeightAverage({"easy": 2.0, "hard": 1.0})
    dwa.adapt({"easy": 2.0, "hard": 1.0})
    with pytest.raises(ValueError, match=rf"Found {loss} for 'hard'.*\n.*adapt\({{'easy'"):
        dwa.adapt({"easy": 1.0, "hard": loss})
    assert dwa.base_weights == pytest.approx({"easy": 1.5, "hard": 1.5})


@one_backend
def test_a_loss_of_the_evaluation_that_is_zero_is_named_and_changes_nothing():
    dwa = DynamicWeightAverage(NAMES)
    model = compiled(dict_model(kernel_initializer="zeros"), dwa)
    zeros = {"easy": Y["easy"], "hard": np.zeros_like(Y["hard"])}
    with pytest.raises(ValueError, match=r"Found 0\.0 for 'hard'"):
        dwa.adapt(model, X, zeros)
    assert dwa.base_weights == dwa.factors == {"easy": 1.0, "hard": 1.0}


@one_backend
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"easy": 1.0},), r"needs one loss for each of \['easy', 'hard'\]. Found \['easy'\]"),
        (({"easy": "1", "hard": 1.0},), "real numbers or scalar tensors. Found '1' for 'easy'"),
        (({"easy": 1.0, "hard": 2.0}, X), "averages and no data"),
        (({"easy": 1e-30, "hard": 1e30},), "base weight .* Found .* for 'hard'"),
        ((X, Y), "takes a compiled model and its data"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DynamicWeightAverage(NAMES).adapt(*arguments)


@one_backend
def test_a_model_without_the_weights_is_refused_as_in_fit():
    model = compiled(dict_model(), weighting := LossWeighting(NAMES), loss_weights=None)
    with pytest.raises(ValueError, match="was not compiled with this callback's loss weights"):
        weighting.adapt(model, X, Y)


@one_backend
def test_prints_what_it_set(capsys):
    DynamicWeightAverage(NAMES, verbose=1).adapt({"easy": 3.0, "hard": 1.0})
    assert capsys.readouterr().out == (
        "\nDynamicWeightAverage setting base weights to easy: 0.5000, hard: 1.5000.\n"
        "The losses are easy: 3.0000, hard: 1.0000.\n"
    )
