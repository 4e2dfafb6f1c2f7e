"""A trained model and its DWA state, written and read."""

import copy
import pickle

import keras
import numpy as np
import pytest
from common import (
    LOSSES,
    ComputeLoss,
    TwoHeads,
    X,
    Y,
    check_run,
    dict_model,
    heads,
    joined,
    train,
)

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


def fit_on(model, dwa, *callbacks, epochs, initial_epoch=0):
    """Without shuffling, so that two runs can be the same."""
    arguments = {"batch_size": 8, "shuffle": False, "verbose": 0, "callbacks": [dwa, *callbacks]}
    return model.fit(X, Y, epochs=epochs, initial_epoch=initial_epoch, **arguments).history


def compiled_model(dwa, model=None, optimizer=None):
    model = model or dict_model()
    optimizer = optimizer or keras.optimizers.Adam(0.01)
    model.compile(optimizer, LOSSES, loss_weights=dwa.loss_weights)
    return model


def check_same(history, expected):
    assert history.keys() == expected.keys()
    for key, values in history.items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-6)


def after(history, epochs):
    return {key: values[epochs:] for key, values in history.items()}


@pytest.mark.parametrize("make_model", [dict_model, TwoHeads])
def test_loaded_model_goes_on_with_the_optimizer_and_the_state(dwa, tmp_path, make_model):
    model = compiled_model(dwa, make_model())
    fit_on(model, dwa, epochs=3)
    model.save(tmp_path / "model.keras")
    expected = fit_on(model, dwa, epochs=5, initial_epoch=3)

    loaded = keras.models.load_model(tmp_path / "model.keras")
    resumed = DynamicWeightAverage(dwa.outputs, temperature=0.2)
    loaded.compile(loaded.optimizer, LOSSES, loss_weights=resumed.loss_weights)
    resumed.set_model(loaded)
    loaded.load_weights(tmp_path / "model.keras")
    check_same(fit_on(loaded, resumed, epochs=5, initial_epoch=3), expected)


@pytest.mark.parametrize("file", ["state.weights.h5", "model.keras", "state.weights.json"])
def test_weights_file_carries_the_state(dwa, tmp_path, file):
    model = dict_model()
    history = train(model, dwa, epochs=3)
    if file == "state.weights.json":
        model.save_weights(tmp_path / file, max_shard_size=2e-7)
        assert len(list(tmp_path.iterdir())) > 2
    elif file == "model.keras":
        model.save(tmp_path / file)
    else:
        model.save_weights(tmp_path / file)
    # The same outputs in another order.
    other, resumed = dict_model(), DynamicWeightAverage({"hard": 0.5, "easy": 3.0}, 0.2)
    other.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=resumed.loss_weights)
    resumed.set_model(other)
    other.load_weights(tmp_path / file)
    assert resumed.step() == dwa.step()
    with pytest.warns(UserWarning, match="after 4 epochs"):  # Three are from the file.
        resumed.step({"easy": float("nan"), "hard": 1.0})
    second = other.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[resumed]).history
    check_run({key: history[key] + second[key] for key in history}, dwa)


def test_checkpoint_of_weights_goes_on_from_its_epoch(dwa, tmp_path):
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "{epoch}.weights.h5", monitor="base_loss", mode="min", save_weights_only=True
    )
    expected = after(fit_on(compiled_model(dwa), dwa, checkpoint, epochs=5), 3)
    resumed = DynamicWeightAverage(dwa.outputs, temperature=0.2)
    model = compiled_model(resumed)
    resumed.set_model(model)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "3.weights.h5")
    check_same(fit_on(model, resumed, epochs=5, initial_epoch=3), expected)


def test_checkpoint_of_the_whole_model_goes_on_from_its_epoch(dwa, tmp_path):
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "{epoch}.keras", monitor="base_loss", mode="min"
    )
    expected = after(fit_on(compiled_model(dwa), dwa, checkpoint, epochs=5), 3)
    resumed = DynamicWeightAverage(dwa.outputs, temperature=0.2)
    model = keras.models.load_model(tmp_path / "3.keras")
    compiled_model(resumed, model, model.optimizer)
    resumed.set_model(model)
    model.load_weights(tmp_path / "3.keras")
    check_same(fit_on(model, resumed, epochs=5, initial_epoch=3), expected)


def test_weights_loaded_before_the_callback_knows_its_model_are_warned_of(dwa, tmp_path):
    model = compiled_model(dwa)
    fit_on(model, dwa, epochs=3)
    model.save(tmp_path / "model.keras")
    resumed = DynamicWeightAverage(dwa.outputs, temperature=0.2)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    compiled_model(resumed, loaded, loaded.optimizer)
    loaded.load_weights(tmp_path / "model.keras")
    written = (
        r"epoch 4, but .* afresh.* `weighting\.set_model\(model\)` before `model\.load_weights"
    )
    with pytest.warns(UserWarning, match=written):
        fit_on(loaded, resumed, epochs=5, initial_epoch=3)


def test_file_without_state_that_training_goes_on_from_is_warned_of(dwa, tmp_path):
    # As one that an earlier release wrote.
    model = compiled_model(dwa)
    model.optimizer.build(model.trainable_variables)
    model.save_weights(tmp_path / "state.weights.h5")
    dwa.set_model(model)
    model.load_weights(tmp_path / "state.weights.h5")
    written = "epoch 4, but starts afresh. The file that was read has no state that this release"
    with pytest.warns(UserWarning, match=written):
        fit_on(model, dwa, epochs=5, initial_epoch=3)


def test_early_stopping_restores_the_parameters_and_leaves_the_state(dwa):
    class Parameters(keras.callbacks.Callback):
        epochs = ()

        def on_epoch_end(self, epoch, logs=None):
            self.epochs += (self.model.get_weights(),)

    model = compiled_model(dwa)
    # `hard` never stops falling here, so that the first epoch is the best.
    stop = keras.callbacks.EarlyStopping(
        "hard_loss", mode="max", patience=3, restore_best_weights=True
    )
    parameters = Parameters()
    history = fit_on(model, dwa, parameters, stop, epochs=9)
    assert len(history["loss"]) == 4
    for restored, best in zip(model.get_weights(), parameters.epochs[0], strict=True):
        np.testing.assert_array_equal(restored, best)
    second = fit_on(model, dwa, epochs=2)
    check_run({key: history[key] + second[key] for key in history}, dwa)


def test_parameters_go_between_models_with_and_without_the_callback(dwa):
    with_dwa, without = compiled_model(dwa), dict_model()
    fit_on(with_dwa, dwa, epochs=2)
    without.set_weights(with_dwa.get_weights())
    np.testing.assert_array_equal(without.predict(X)["easy"], with_dwa.predict(X)["easy"])
    moved = dwa.step()
    with_dwa.set_weights(dict_model().get_weights())
    assert dwa.step() == moved
    assert (without.predict(X)["easy"] != with_dwa.predict(X)["easy"]).all()


def test_cloned_model_trains_with_a_callback_of_its_own(dwa):
    model = compiled_model(dwa)
    fit_on(model, dwa, epochs=3)
    moved = dwa.step()
    cloned, other = keras.models.clone_model(model), DynamicWeightAverage(["easy", "hard"], 0.2)
    check_run(train(cloned, other), other)
    assert dwa.step() == moved


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deep", "pickle"],
)
def test_copied_model_evaluates_to_the_same_numbers(dwa, copied):
    model = compiled_model(dwa)
    fit_on(model, dwa, epochs=3)
    expected = model.evaluate(X, Y, verbose=0, return_dict=True)
    check_same(copied(model).evaluate(X, Y, verbose=0, return_dict=True), expected)


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


def test_state_of_names_of_any_length_is_read(tmp_path):
    for name in ("a", "ab", "größe"):
        dwa = DynamicWeightAverage([name, "hard"])
        inputs, outputs = heads()
        model = keras.Model(inputs, {name: outputs["easy"], "hard": outputs["hard"]})
        model.compile("sgd", {name: "mse", "hard": "mae"}, loss_weights=dwa.loss_weights)
        dwa.set_model(model)
        dwa.step({name: 2.0, "hard": 4.0})
        moved = dwa.step({name: 1.0, "hard": 3.0})
        model.save_weights(tmp_path / "state.weights.h5")
        dwa.reset()
        model.load_weights(tmp_path / "state.weights.h5")
        assert dwa.step() == moved != {name: 1.0, "hard": 1.0}


def test_state_of_other_outputs_is_refused(dwa, tmp_path):
    model = dict_model()
    train(model, dwa, epochs=1)
    model.save_weights(tmp_path / "state.weights.h5")
    inputs = model.inputs
    other = keras.Model(inputs, {"easy": model.outputs[0], "third": model.outputs[1]})
    third = DynamicWeightAverage(["easy", "third"])
    other.compile("sgd", {"easy": "mse", "third": "mse"}, loss_weights=third.loss_weights)
    third.set_model(other)
    with pytest.raises(ValueError, match=r"outputs=\['easy', 'hard'\]"):
        other.load_weights(tmp_path / "state.weights.h5")


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 3:
            raise KeyboardInterrupt


def backed_up_run(tmp_path, way, order, *others):
    """A run of six epochs that starts where the backup ends."""
    keras.utils.set_random_seed(0)
    dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
    if way == "compile":
        model = compiled_model(dwa)
    else:
        model = ComputeLoss(dwa)
        model(X)
        model.compile(keras.optimizers.Adam(0.01))
    both = [dwa, keras.callbacks.BackupAndRestore(tmp_path)]
    arguments = {"batch_size": 8, "shuffle": False, "verbose": 0}
    model.fit(X, Y, epochs=6, callbacks=[*both[::order], *others], **arguments)


@pytest.mark.parametrize("way", ["compile", "compute_loss"])
def test_backup_and_restore_resumes_the_history(tmp_path, way):
    whole, interrupted, resumed = (keras.callbacks.History() for _ in range(3))
    backed_up_run(tmp_path, way, 1, whole)
    with pytest.raises(KeyboardInterrupt):
        backed_up_run(tmp_path, way, 1, interrupted, Interrupt())
    backed_up_run(tmp_path, way, 1, resumed)
    assert interrupted.epoch + resumed.epoch == whole.epoch == list(range(6))
    history = {key: interrupted.history[key] + resumed.history[key] for key in whole.history}
    check_same(history, whole.history)


def test_backup_that_comes_before_the_callback_is_warned_of(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        backed_up_run(tmp_path, "compile", -1, Interrupt())
    written = (
        r"epoch 4, but .* only 2 .*\n.*callbacks=\[weighting, keras\.callbacks\.BackupAndRestore"
    )
    with pytest.warns(UserWarning, match=written) as warned:
        backed_up_run(tmp_path, "compile", -1)
    assert sum(warning.category is UserWarning for warning in warned) == 1


def test_backup_that_comes_before_the_callback_is_warned_of_in_a_later_fit(dwa, tmp_path):
    model = compiled_model(dwa)
    fit_on(model, dwa, epochs=5)
    arguments = {"batch_size": 8, "epochs": 5, "verbose": 0}
    callbacks = [keras.callbacks.BackupAndRestore(tmp_path), dwa]
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, callbacks=[*callbacks, Interrupt()], **arguments)
    with pytest.warns(UserWarning, match="epoch 4, but .* only 2 "):
        model.fit(X, Y, callbacks=callbacks, **arguments)


def test_weights_loaded_within_a_fit_are_not_warned_of(dwa, tmp_path):
    class Reload(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                self.model.save_weights(tmp_path / "first.weights.h5")
            if epoch == 3:
                self.model.load_weights(tmp_path / "first.weights.h5")
                reloaded.append(dwa.step())

    reloaded = []
    history = fit_on(compiled_model(dwa), dwa, Reload(), epochs=6)
    assert reloaded == [dwa.outputs]
    after_first = {key: [values[0], *values[4:]] for key, values in history.items()}
    check_run(after_first, dwa)


@pytest.mark.parametrize("loaded_at", [0, 4])
def test_weights_loaded_before_an_epoch_is_closed_are_not_those_it_had(dwa, tmp_path, loaded_at):
    class RollBack(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            had.append(float(dwa.loss_weights["easy"]))

        def on_epoch_end(self, epoch, logs=None):
            if epoch == loaded_at:
                self.model.load_weights(tmp_path / "moved.weights.h5")

    had = []
    model = compiled_model(dwa)
    train(model, dwa)
    model.save_weights(tmp_path / "moved.weights.h5")
    dwa.reset()
    arguments = {"batch_size": 8, "epochs": 6, "verbose": 0, "callbacks": [RollBack(), dwa]}
    history = model.fit(X, Y, **arguments).history
    assert history["easy_weight"] == had
    base_loss = 3 * np.array(history["easy_loss"]) + 0.5 * np.array(history["hard_loss"])
    np.testing.assert_allclose(history["base_loss"], base_loss, rtol=1e-5)


def test_callback_of_other_base_weights_goes_on_under_its_own(dwa, tmp_path):
    model = compiled_model(dwa)
    first = fit_on(model, dwa, epochs=3)
    model.save_weights(tmp_path / "state.weights.h5")
    other = DynamicWeightAverage({"easy": 1.0, "hard": 10.0}, temperature=0.2)
    model = compiled_model(other)
    model.optimizer.build(model.trainable_variables)
    other.set_model(model)
    model.load_weights(tmp_path / "state.weights.h5")
    weights = other.step()
    moved = dwa.step()
    np.testing.assert_allclose(weights["easy"], moved["easy"] / 3, rtol=1e-6)
    np.testing.assert_allclose(weights["hard"], moved["hard"] / 0.5 * 10, rtol=1e-6)
    history = joined(first, fit_on(model, other, epochs=5, initial_epoch=3))
    for name, base_weight in dwa.outputs.items():
        of_first = history[f"{name}_weight"][:3]
        history[f"{name}_weight"][:3] = np.array(of_first) / base_weight * other.outputs[name]
    history.pop("loss")
    check_run(history, other)


def test_epochs_left_out_between_two_fits_are_not_warned_of(dwa):
    model = compiled_model(dwa)
    histories = fit_on(model, dwa, epochs=2), fit_on(model, dwa, initial_epoch=5, epochs=7)
    check_run(joined(*histories), dwa)


def test_callback_that_comes_in_later_starts_afresh_without_a_warning(dwa):
    model = dict_model()
    model.compile("sgd", LOSSES)
    model.fit(X, Y, epochs=3, verbose=0)
    compiled_model(dwa, model, model.optimizer)
    dwa.set_model(model)
    dwa.reset()
    check_run(fit_on(model, dwa, initial_epoch=3, epochs=6), dwa)
