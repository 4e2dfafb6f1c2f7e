"""Saving and loading a trained model with its DWA state."""

import keras
import numpy as np
import pytest
from common import (
    NAMES,
    Lambda,
    X,
    Y,
    check_run,
    compiled,
    dict_model,
    fit,
    move,
    one_backend,
    train,
)
from run_to_kill import Stop

from keras_dwa import CompoundLoss, DynamicWeightAverage


def new_dwa(outputs=None):
    return DynamicWeightAverage(outputs or {"easy": 3.0, "hard": 0.5}, temperature=0.2)


@pytest.fixture
def dwa():
    return new_dwa()


def check_same_parameters(model, expected):
    for ours, theirs in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# What files contain. `test_windows.py` and `test_killed.py` resume from weights files.


def test_saved_model_evaluates_to_the_same_numbers_and_continues(dwa, tmp_path):
    resumed = new_dwa()
    model = compiled(dict_model(), dwa, optimizer=keras.optimizers.Adam(0.01))
    checkpoint = keras.callbacks.ModelCheckpoint(f"{tmp_path}/{{epoch}}.keras")
    history = fit(model, dwa, checkpoint, epochs=4)
    loaded = keras.models.load_model(tmp_path / "4.keras")
    np.testing.assert_allclose(*[each.evaluate(X, Y, verbose=0) for each in (loaded, model)], 1e-6)
    loaded = keras.models.load_model(tmp_path / "2.keras")
    resumed.set_model(compiled(loaded, resumed, optimizer=loaded.optimizer))
    loaded.load_weights(tmp_path / "2.keras")
    for key, values in fit(loaded, resumed, epochs=4, initial_epoch=2).items():
        np.testing.assert_allclose(values, history[key][2:], rtol=1e-6)


@one_backend
def test_sharded_weights_carry_the_state_to_other_base_weights_in_another_order(dwa, tmp_path):
    model, other = compiled(dict_model(), dwa), new_dwa({"hard": 10.0, "easy": 1.0})
    dwa.set_model(model)
    move(dwa)
    model.save_weights(tmp_path / "state.weights.json", max_shard_size=2e-7)
    assert len(list(tmp_path.iterdir())) > 2
    model = compiled(dict_model(), other)
    other.set_model(model)
    CompoundLoss(NAMES, other).combine({"easy": 1.0, "hard": 9.0})  # To be forgotten.
    model.load_weights(tmp_path / "state.weights.json")
    losses = {"easy": 0.9, "hard": 2.0}
    for weights, moved in ((other.step(), dwa.step()), (other.step(losses), dwa.step(losses))):
        np.testing.assert_allclose(weights["easy"], moved["easy"] / 3, rtol=1e-6)
        np.testing.assert_allclose(weights["hard"], moved["hard"] / 0.5 * 10, rtol=1e-6)
    with pytest.warns(UserWarning, match="after 4 epochs"):  # Two are from the file.
        other.step({"easy": float("nan"), "hard": 1.0})


@one_backend
def test_state_of_other_outputs_is_refused(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, {name: keras.layers.Dense(1)(inputs) for name in ("größe", "a")})
    for names in (["größe", "a"], ["a"]):
        dwa = new_dwa(names)
        dwa.set_model(compiled(model, dwa, loss=dict.fromkeys(names, "mse")))
        model.save_weights(tmp_path / f"{len(names)}.weights.h5")
    with pytest.raises(ValueError, match=r"outputs=\['größe', 'a'\]"):
        model.load_weights(tmp_path / "2.weights.h5")


@one_backend
def test_parameters_are_restored_and_go_between_models_without_the_state(dwa, tmp_path):
    model, without = dict_model(), dict_model()
    # The first epoch is the best, because no other is better by that much.
    stop = keras.callbacks.EarlyStopping(
        "base_loss", mode="min", min_delta=1e9, patience=2, restore_best_weights=True
    )
    train(model, dwa, epochs=9, others=[stop])
    moved, parameters = dwa.step(), without.get_weights()
    check_same_parameters(model, stop.best_weights)
    model.save_weights(tmp_path / "with.weights.h5")
    without.compile("sgd")
    without.save_weights(tmp_path / "without.weights.h5")
    model.load_weights(tmp_path / "without.weights.h5")
    without.load_weights(tmp_path / "with.weights.h5")
    check_same_parameters(model, parameters)
    check_same_parameters(without, stop.best_weights)
    assert dwa.step() == moved != dwa.base_weights


# Backups, and files read within a `fit`.


@one_backend
def test_backup_that_comes_before_the_callback_is_warned_of(tmp_path):
    def fit_on(*others):
        dwa, backup = new_dwa(), keras.callbacks.BackupAndRestore(tmp_path)
        fit(compiled(dict_model(), dwa), backup, dwa, *others, epochs=4)

    with pytest.raises(KeyboardInterrupt):
        fit_on(Stop(2, 0))
    to_write = r"callbacks=\[weighting, keras\.callbacks\.BackupAndRestore"
    with pytest.warns(UserWarning, match=rf"epoch 3, but .* only 1 .*\n.*{to_write}"):
        fit_on()


@one_backend
def test_file_that_is_read_as_an_epoch_ends_counts_from_the_next_one(dwa, tmp_path):
    model, file = compiled(dict_model(), dwa), tmp_path / "moved.weights.h5"
    dwa.set_model(model)
    moved = move(dwa)
    model.save_weights(file)
    dwa.reset()
    load = Lambda(on_epoch_end=lambda epoch, logs: epoch == 2 and model.load_weights(file))
    history = fit(model, dwa, load, epochs=4)
    check_run({key: values[:3] for key, values in history.items()}, dwa)
    assert history["easy_weight"][3] == moved["easy"]


@one_backend
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("factors", [1.0, float("nan")]),
        ("factors", [1.0, -5.0]),
        ("factors", [1.0, 1.0, 1.0]),
        ("scale", [0.0, 1.0]),
        ("periods", 1.5),
        ("window", [0.0, 0.0, -1.0, 0.0, 0.0]),
        ("window", None),
    ],
)
def test_damaged_state_is_refused_and_changes_nothing(dwa, field, value):
    move(dwa)
    store = {}
    dwa._weights.save_own_variables(store)
    store["window"] = np.array([-1.0, 0.0, 1.0, 1.0, 1.0])  # Losses may be negative.
    dwa._weights.load_own_variables(store)
    del store[field]
    if value is not None:
        store[field] = np.array(value)
    dwa.reset()
    with pytest.raises(ValueError, match=rf"weights in the file is damaged.* as `{field}`"):
        dwa._weights.load_own_variables(store)
    assert dwa.step() == dwa.base_weights


@one_backend
def test_legacy_file_of_a_model_with_live_weights_is_refused_when_it_is_saved(dwa, tmp_path):
    model = dict_model()
    train(model, dwa, epochs=1)
    with pytest.raises(RuntimeError, match=r"legacy `\.h5` file.*`\.keras`"):
        model.save(tmp_path / "model.h5")
