"""A trained model and its DWA state, written and read."""

import keras
import numpy as np
import pytest
from common import LOSSES, TwoHeads, X, Y, check_run, dict_model, train

from keras_dwa import DynamicWeightAverage


@pytest.fixture
def dwa():
    return DynamicWeightAverage({"easy": 3.0, "hard": 0.5}, temperature=0.2)


@pytest.mark.parametrize("make_model", [dict_model, TwoHeads])
def test_saved_model_loads_and_evaluates_to_the_same_numbers(dwa, tmp_path, make_model):
    model = make_model()
    train(model, dwa)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = model.evaluate(X, Y, batch_size=8, verbose=0, return_dict=True)
    results = loaded.evaluate(X, Y, batch_size=8, verbose=0, return_dict=True)
    assert results.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(results[key], value, rtol=1e-6)


def test_loaded_model_goes_on_with_the_optimizer_and_the_state(dwa, tmp_path):
    def fit(model, dwa, epochs):
        return model.fit(
            X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=[dwa]
        ).history

    model = dict_model()
    model.compile(keras.optimizers.Adam(0.01), LOSSES, loss_weights=dwa.loss_weights)
    fit(model, dwa, 3)
    model.save(tmp_path / "model.keras")
    expected = fit(model, dwa, 2)

    loaded = keras.models.load_model(tmp_path / "model.keras")
    resumed = DynamicWeightAverage(dwa.outputs, temperature=0.2)
    loaded.compile(loaded.optimizer, LOSSES, loss_weights=resumed.loss_weights)
    resumed.set_model(loaded)
    loaded.load_weights(tmp_path / "model.keras")
    for key, values in fit(loaded, resumed, 2).items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-6)


def test_weights_file_carries_the_state(dwa, tmp_path):
    model = dict_model()
    history = train(model, dwa, epochs=3)
    model.save_weights(tmp_path / "state.weights.h5")
    # The same outputs in another order.
    other, resumed = dict_model(), DynamicWeightAverage({"hard": 0.5, "easy": 3.0}, 0.2)
    other.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=resumed.loss_weights)
    resumed.set_model(other)
    other.load_weights(tmp_path / "state.weights.h5")
    assert resumed.step() == dwa.step()
    with pytest.warns(UserWarning, match="after 4 epochs"):  # Three are from the file.
        resumed.step({"easy": float("nan"), "hard": 1.0})
    second = other.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[resumed]).history
    check_run({key: history[key] + second[key] for key in history}, dwa)


def test_weights_files_with_and_without_state_load_into_models_without_and_with(dwa, tmp_path):
    with_state, without = dict_model(), dict_model()
    train(with_state, dwa)
    moved = dwa.step()
    without.compile(keras.optimizers.SGD(0.05), LOSSES)
    without.fit(X, Y, verbose=0)
    without.save_weights(tmp_path / "without.weights.h5")
    with_state.load_weights(tmp_path / "without.weights.h5")
    for ours, theirs in zip(with_state.get_weights(), without.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert dwa.step() == moved
    train(with_state, dwa, epochs=1)
    with_state.save_weights(tmp_path / "with.weights.h5")
    without.load_weights(tmp_path / "with.weights.h5")
    for ours, theirs in zip(with_state.get_weights(), without.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_state_of_other_outputs_is_refused(dwa, tmp_path):
    model = dict_model()
    train(model, dwa, epochs=1)
    model.save_weights(tmp_path / "state.weights.h5")
    inputs = model.inputs
    other = keras.Model(inputs, {"easy": model.outputs[0], "third": model.outputs[1]})
    third = DynamicWeightAverage(["easy", "third"])
    other.compile("sgd", {"easy": "mse", "third": "mse"}, loss_weights=third.loss_weights)
    third.set_model(other)
    with pytest.raises(ValueError, match=r"DynamicWeightAverage\(\['easy', 'hard'\]\)"):
        other.load_weights(tmp_path / "state.weights.h5")


def test_backup_and_restore_resumes_the_history(dwa, tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3:
                raise KeyboardInterrupt

    def fit(history, *others):
        keras.utils.set_random_seed(0)
        model = dict_model()
        dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
        model.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=dwa.loss_weights)
        callbacks = [dwa, history, *others]
        model.fit(X, Y, batch_size=8, epochs=6, shuffle=False, verbose=0, callbacks=callbacks)

    whole, interrupted, resumed = (keras.callbacks.History() for _ in range(3))
    fit(whole)
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, keras.callbacks.BackupAndRestore(tmp_path), Interrupt())
    fit(resumed, keras.callbacks.BackupAndRestore(tmp_path))
    assert interrupted.epoch + resumed.epoch == whole.epoch == list(range(6))
    for key, values in whole.history.items():
        both = interrupted.history[key] + resumed.history[key]
        np.testing.assert_allclose(both, values, rtol=1e-6)
