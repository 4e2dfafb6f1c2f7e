"""`adapt` scales base weights to the losses."""

import pickle

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    NAMES,
    Lambda,
    TwoHeads,
    X,
    Y,
    check_base_loss,
    check_run,
    compiled,
    dict_model,
    fit,
    one_backend,
    train,
)
from test_own_steps import NAMES as VAE_NAMES
from test_own_steps import VAE

from keras_dwa import DynamicWeightAverage

if BACKEND == "torch":
    import torch

# Makes the scales of the two losses differ.
FAR = {"easy": 10 * Y["easy"], "hard": Y["hard"]}


class Noisy(TwoHeads):
    """Also draws random numbers in an evaluation."""

    def __init__(self):
        super().__init__()
        self.seed = keras.random.SeedGenerator(0)

    def call(self, x):
        return super().call(x + 0.01 * keras.random.normal(keras.ops.shape(x), seed=self.seed))


def shares(logs, weighting):
    """The share of each loss in the total, from the logs of an evaluation or epoch."""
    parts = {n: weighting.base_weights[n] * logs[f"{n}_loss"] for n in weighting.outputs}
    return {name: part / sum(parts.values()) for name, part in parts.items()}


def test_each_loss_starts_with_its_share_and_the_weights_reach_the_step():
    dwa = DynamicWeightAverage({"easy": 3.0, "hard": 1.0}, temperature=0.2)
    model = compiled(dict_model(), dwa, 0.001)
    dwa.adapt(model, X, FAR, batch_size=8)
    assert sum(dwa.base_weights.values()) == pytest.approx(4)
    assert dwa.base_weights["easy"] < 1
    logs = model.evaluate(X, FAR, batch_size=8, verbose=0, return_dict=True)
    assert shares(logs, dwa) == pytest.approx({"easy": 0.75, "hard": 0.25}, rel=1e-5)
    check_run(fit(model, dwa, y=FAR, epochs=4, validation_data=(X, FAR)), dwa)


def test_evaluation_moves_nothing_else_even_if_it_fails():
    dwa = DynamicWeightAverage(NAMES, temperature=0.2)
    model = compiled(Noisy(), dwa, metrics={"easy": ["mae"]})
    fit(model, dwa, epochs=1)

    def values():
        """Those of all variables but the weights, and torch's random state."""
        variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
        others = [variable for variable in variables if variable is not dwa.variables[0]]
        arrays = [keras.ops.convert_to_numpy(variable).copy() for variable in others]
        return [*arrays, torch.get_rng_state().numpy()] if BACKEND == "torch" else arrays

    def interrupt(batch, logs):
        if batch == 3:
            raise KeyboardInterrupt

    before, calls = values(), [(None, []), ({"easy": Y["easy"]}, [])]
    # After an interruption, Keras 3.10 makes a thread wait for itself.
    if not keras.__version__.startswith("3.10."):
        calls.append((Y, [Lambda(on_test_batch_begin=interrupt)]))
    for y, callbacks in calls:
        with pytest.raises((ValueError, KeyError, KeyboardInterrupt)):
            dwa.adapt(model, X, y, batch_size=8, callbacks=callbacks)
        np.testing.assert_equal(values(), before)
    assert dwa.base_weights == {"easy": 1.0, "hard": 1.0}
    dwa.adapt(model, X, FAR)
    np.testing.assert_equal(values(), before)
    check_run(fit(model, dwa, y=FAR, epochs=1), dwa)


@one_backend
def test_adapting_within_an_epoch_loses_no_batch_of_a_window():
    dwa = DynamicWeightAverage(NAMES, update_freq=2)
    model = compiled(dict_model(), dwa, 0.001)
    adapt = Lambda(on_train_batch_begin=lambda batch, logs: batch == 3 and dwa.adapt(model, X, FAR))
    history = fit(model, dwa, adapt, y=FAR, epochs=1)
    assert [window.batches for window in dwa.windows] == [2, 2]
    check_base_loss(history, dwa.base_weights)


@one_backend
def test_adapting_again_replaces_the_scale_and_a_reset_or_another_model_keeps_it():
    dwa = DynamicWeightAverage({"easy": 2.0, "hard": 1.0})
    dwa.adapt({"easy": 7.0, "hard": 0.1})
    dwa.adapt({"easy": 4.0, "hard": 1.0})
    dwa.reset()
    check_run(train(dict_model(), dwa, epochs=1), dwa)
    assert dwa.base_weights == pytest.approx({"easy": 1.0, "hard": 2.0})
    assert dwa.get_config()["outputs"] == {"easy": 2.0, "hard": 1.0}
    assert "'easy': 1.0, 'hard': 2.0" in repr(dwa)


@one_backend
def test_the_scale_comes_with_files_and_pickles_under_other_given_base_weights_too(tmp_path):
    dwa = DynamicWeightAverage(NAMES)
    # The same outputs in another order.
    other = DynamicWeightAverage({"hard": 1.0, "easy": 3.0})
    for weighting in (dwa, other):
        model = compiled(dict_model(), weighting)
        weighting.set_model(model)
        if weighting is dwa:
            dwa.adapt({"easy": 3.0, "hard": 1.0})
            model.save_weights(tmp_path / "file.weights.h5")
    model.load_weights(tmp_path / "file.weights.h5")
    assert other.base_weights == pytest.approx({"hard": 2.0, "easy": 2.0})
    assert pickle.loads(pickle.dumps(dwa)).base_weights == dwa.base_weights


def test_compound_loss_and_own_trackers_adapt_to_losses_of_an_evaluation():
    dwa = DynamicWeightAverage({VAE_NAMES[0]: 1.0, VAE_NAMES[1]: 3.0})
    model = compiled(VAE(dwa, tracked=["kl"]), rate=0.001)
    for _ in range(2):  # Before and after a `fit`.
        dwa.adapt(model, X, batch_size=8)
        logs = model.evaluate(X, batch_size=8, verbose=0, return_dict=True)
        assert list(shares(logs, dwa).values()) == pytest.approx([0.25, 0.75], rel=1e-5)
        history = fit(model, dwa, y=None, batch_size=8, epochs=1)
        check_base_loss(history, dwa.base_weights)
        assert history["loss"] == pytest.approx(history["base_loss"], rel=1e-5)


@one_backend
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"easy": 1.0},), r"needs one loss for each of \['easy', 'hard'\]. Found \['easy'\]"),
        (({"easy": 1.0, "hard": 2.0}, X), "averages and no data"),
        (({"easy": 1e-30, "hard": 1e30},), "base weight .* Found .* for 'hard'"),
        (({"easy": 1.0, "hard": 0.0},), r"Found 0.0 for 'hard'.*\n.*adapt\({'easy'"),
        (({"easy": np.nan, "hard": 1.0},), "Found nan for 'easy'"),
        ((X, Y), "takes a compiled model and its data"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(arguments, message):
    dwa = DynamicWeightAverage(NAMES)
    dwa.adapt({"easy": 1.0, "hard": 3.0})
    with pytest.raises(ValueError, match=message):
        dwa.adapt(*arguments)
    assert dwa.base_weights == pytest.approx({"easy": 1.5, "hard": 0.5})


@one_backend
def test_a_model_without_the_weights_is_refused_as_in_fit():
    model = compiled(dict_model(), dwa := DynamicWeightAverage(NAMES), loss_weights=None)
    with pytest.raises(ValueError, match="was not compiled with this callback's loss weights"):
        dwa.adapt(model, X, Y)


@one_backend
def test_prints_what_it_set(capsys):
    DynamicWeightAverage(NAMES, verbose=1).adapt({"easy": 3.0, "hard": 1.0})
    assert capsys.readouterr().out == (
        "\nDynamicWeightAverage setting base weights to easy: 0.5000, hard: 1.5000.\n"
        "The losses are easy: 3.0000, hard: 1.0000.\n"
    )
