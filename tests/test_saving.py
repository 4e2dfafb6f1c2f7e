"""A trained model and its DWA state, written and read."""

import contextlib
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
    joined,
    one_backend,
    train,
)
from run_to_kill import Stop

from keras_dwa import DynamicWeightAverage


def new_dwa(outputs=None):
    return DynamicWeightAverage(outputs or {"easy": 3.0, "hard": 0.5}, temperature=0.2)


@pytest.fixture
def dwa():
    return new_dwa()


def compiled_model(dwa, model=None, optimizer=None):
    model = model or dict_model()
    optimizer = optimizer or keras.optimizers.Adam(0.01)
    model.compile(optimizer, LOSSES, loss_weights=dwa.loss_weights)
    return model


def model_with(dwa, optimizer=None):
    """A compiled model that the callback knows, as before `load_weights`."""
    model = compiled_model(dwa, optimizer=optimizer)
    model.optimizer.build(model.trainable_variables)
    dwa.set_model(model)
    return model


def moved_weights(dwa):
    """Closes two epochs, after which the weights have moved."""
    names = list(dwa.outputs)
    dwa.step(dict(zip(names, (2.0, 4.0), strict=True)))
    return dwa.step(dict(zip(names, (1.0, 3.0), strict=True)))


def fit_on(model, *callbacks, epochs, initial_epoch=0):
    """Without shuffling, so that two runs can be the same."""
    arguments = {"batch_size": 8, "shuffle": False, "verbose": 0, "callbacks": callbacks}
    return model.fit(X, Y, epochs=epochs, initial_epoch=initial_epoch, **arguments).history


def evaluate(model):
    return model.evaluate(X, Y, batch_size=8, verbose=0, return_dict=True)


def check_same(history, expected):
    assert history.keys() == expected.keys()
    for key, values in history.items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-6)


def check_same_parameters(model, expected):
    for ours, theirs in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# What a file has.


@pytest.mark.parametrize(
    ("make_model", "kind"),
    [(dict_model, "weights.h5"), (dict_model, "keras"), (TwoHeads, "keras")],
)
def test_checkpoint_evaluates_to_the_same_numbers_and_goes_on(dwa, tmp_path, make_model, kind):
    checkpoint = keras.callbacks.ModelCheckpoint(
        f"{tmp_path}/{{epoch}}.{kind}", save_weights_only=kind == "weights.h5"
    )
    model = compiled_model(dwa, make_model())
    history = fit_on(model, dwa, checkpoint, epochs=5)
    resumed = new_dwa()
    if kind == "keras":
        check_same(evaluate(keras.models.load_model(tmp_path / "5.keras")), evaluate(model))
        loaded = keras.models.load_model(tmp_path / "3.keras")
        compiled_model(resumed, loaded, loaded.optimizer)
        resumed.set_model(loaded)
    else:
        loaded = model_with(resumed)
    loaded.load_weights(tmp_path / f"3.{kind}")
    expected = {key: values[3:] for key, values in history.items()}
    check_same(fit_on(loaded, resumed, epochs=5, initial_epoch=3), expected)


def test_sharded_weights_carry_the_state_to_other_base_weights_in_another_order(dwa, tmp_path):
    # Keras 3.10 loses the variables of other optimizers between shards.
    model, other = model_with(dwa, "sgd"), new_dwa({"hard": 10.0, "easy": 1.0})
    moved_weights(dwa)
    model.save_weights(tmp_path / "state.weights.json", max_shard_size=2e-7)
    assert len(list(tmp_path.iterdir())) > 2
    model_with(other, "sgd").load_weights(tmp_path / "state.weights.json")
    losses = {"easy": 0.9, "hard": 2.0}
    for weights, moved in ((other.step(), dwa.step()), (other.step(losses), dwa.step(losses))):
        np.testing.assert_allclose(weights["easy"], moved["easy"] / 3, rtol=1e-6)
        np.testing.assert_allclose(weights["hard"], moved["hard"] / 0.5 * 10, rtol=1e-6)
    with pytest.warns(UserWarning, match="after 4 epochs"):  # Two are from the file.
        other.step({"easy": float("nan"), "hard": 1.0})


def test_state_of_other_outputs_is_refused(tmp_path):
    inputs, (easy, hard) = keras.Input((4,)), (keras.layers.Dense(units) for units in (1, 2))
    model = keras.Model(inputs, {"größe": easy(inputs), "a": hard(inputs)})
    for names in (["größe", "a"], ["a"]):
        dwa = new_dwa(names)
        model.compile("sgd", dict.fromkeys(names, "mse"), loss_weights=dwa.loss_weights)
        dwa.set_model(model)
        model.save_weights(tmp_path / f"{len(names)}.weights.h5")
    with pytest.raises(ValueError, match=r"outputs=\['größe', 'a'\]"):
        model.load_weights(tmp_path / "2.weights.h5")


# Models with and without it, and copies.


def test_parameters_are_restored_and_go_between_models_without_the_state(dwa, tmp_path):
    with_dwa, without = dict_model(), dict_model()
    dwa.temperature = 2.0  # Which moves the weights, assigned later, too.
    # The first epoch is the best, for none is better by so much.
    stop = keras.callbacks.EarlyStopping(
        "base_loss", mode="min", min_delta=1e9, patience=3, restore_best_weights=True
    )
    first = train(with_dwa, dwa, epochs=9, others=[stop])
    assert len(first["loss"]) == 4
    check_same_parameters(with_dwa, stop.best_weights)
    without.compile(keras.optimizers.SGD(0.05), LOSSES)
    without.fit(X, Y, verbose=0)
    moved, parameters = dwa.step(), without.get_weights()
    with_dwa.save_weights(tmp_path / "with.weights.h5")
    without.save_weights(tmp_path / "without.weights.h5")
    with_dwa.load_weights(tmp_path / "without.weights.h5")
    without.load_weights(tmp_path / "with.weights.h5")
    check_same_parameters(with_dwa, parameters)
    check_same_parameters(without, stop.best_weights)
    assert dwa.step() == moved
    check_run(joined(first, train(with_dwa, dwa, epochs=2)), dwa)


def test_copies_evaluate_to_the_same_numbers_and_a_clone_has_a_callback_of_its_own(dwa):
    model = compiled_model(dwa)
    fit_on(model, dwa, epochs=3)
    moved, expected = dwa.step(), evaluate(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check_same(evaluate(copied), expected)
    other = DynamicWeightAverage(["easy", "hard"], 0.2)
    check_run(train(keras.models.clone_model(model), other), other)
    assert dwa.step() == moved


# Backups, and files read within a `fit`.


def backed_up_run(tmp_path, order, *others):
    """A run of six epochs that starts where the backup ends."""
    keras.utils.set_random_seed(0)
    dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
    model = ComputeLoss(dwa)
    model(X)
    model.compile(keras.optimizers.Adam(0.01))
    both = [dwa, keras.callbacks.BackupAndRestore(tmp_path)]
    return fit_on(model, *both[::order], *others, epochs=6)


def test_backup_and_restore_resumes_the_history_of_a_compound_loss(tmp_path):
    # `test_killed.py` has the weights in `compile`.
    whole, interrupted = backed_up_run(tmp_path, 1), keras.callbacks.History()
    with pytest.raises(KeyboardInterrupt):
        backed_up_run(tmp_path, 1, interrupted, Stop(3, 0))
    resumed = backed_up_run(tmp_path, 1)
    assert [len(resumed["loss"]), interrupted.epoch] == [3, [0, 1, 2]]
    check_same(joined(interrupted.history, resumed), whole)


@one_backend
def test_file_that_is_read_forgets_what_was_recorded_since(dwa, tmp_path):
    model = ComputeLoss(dwa)
    model.compile("sgd")
    model.fit(X, Y, batch_size=8, epochs=3, verbose=0, callbacks=[dwa])
    model.save_weights(tmp_path / "state.weights.h5")
    moved = dwa.step()
    model.compound.combine({"easy": 1.0, "hard": 100.0})
    model.load_weights(tmp_path / "state.weights.h5")
    assert dwa.step() == moved != dwa.base_weights


def test_backup_that_comes_before_the_callback_is_warned_of(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        backed_up_run(tmp_path, -1, Stop(3, 0))
    to_write = r"callbacks=\[weighting, keras\.callbacks\.BackupAndRestore"
    with pytest.warns(UserWarning, match=rf"epoch 4, but .* only 2 .*\n.*{to_write}") as warned:
        backed_up_run(tmp_path, -1)
    assert sum(warning.category is UserWarning for warning in warned) == 1


def begin(dwa, epoch, written=None):
    """As a `fit` begins, with a warning if `written` is given."""
    dwa.on_train_begin()
    with pytest.warns(UserWarning, match=written) if written else contextlib.nullcontext():
        dwa.on_epoch_begin(epoch)
    assert dwa._weights.state.epochs == epoch


@one_backend
def test_fit_that_begins_with_epochs_that_no_file_told_of_is_warned_of_once(dwa, tmp_path):
    model, file = compiled_model(dwa), tmp_path / "state.weights.h5"
    # As one that an earlier release wrote.
    model.save_weights(file)
    dwa.set_model(model)
    model.load_weights(file)
    begin(dwa, 3, "epoch 4, but starts afresh. The file that was read has no state that this rel")
    begin(dwa, 7)
    # Where the file knows of fewer epochs, in a later fit, too.
    dwa.reset()
    moved_weights(dwa)
    model.save_weights(file)
    model.load_weights(file)
    begin(dwa, 3, "epoch 4, but .* only 2 ")
    begin(dwa, 7)
    # Read before the callback knows its model.
    dwa = new_dwa()
    model = compiled_model(dwa)
    model.load_weights(file)
    dwa.set_model(model)
    before = r"`weighting\.set_model\(model\)` before `model\.load_weights"
    begin(dwa, 3, rf"epoch 4, but .* afresh.* {before}")
    # Left out on purpose, for the callback comes in later.
    dwa.set_model(compiled_model(dwa))
    dwa.reset()
    begin(dwa, 3)


def test_weights_loaded_within_a_fit_are_not_warned_of(dwa, tmp_path):
    def save_and_load(epoch, logs):
        if epoch == 0:
            reload.model.save_weights(tmp_path / "first.weights.h5")
        if epoch == 3:
            reload.model.load_weights(tmp_path / "first.weights.h5")
            assert dwa.step() == dwa.base_weights

    reload = keras.callbacks.LambdaCallback(on_epoch_end=save_and_load)
    history = fit_on(compiled_model(dwa), dwa, reload, epochs=6)
    check_run({key: [values[0], *values[4:]] for key, values in history.items()}, dwa)


def test_weights_loaded_before_an_epoch_is_closed_are_not_those_it_had(dwa, tmp_path):
    def load(epoch, logs):
        if epoch in (0, 4):
            roll_back.model.load_weights(tmp_path / "moved.weights.h5")

    had, model = [], model_with(dwa)
    moved_weights(dwa)
    model.save_weights(tmp_path / "moved.weights.h5")
    dwa.reset()
    roll_back = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: had.append(float(dwa.loss_weights["easy"])),
        on_epoch_end=load,
    )
    history = fit_on(model, roll_back, dwa, epochs=6)
    assert history["easy_weight"] == had
    base_loss = 3 * np.array(history["easy_loss"]) + 0.5 * np.array(history["hard_loss"])
    np.testing.assert_allclose(history["base_loss"], base_loss, rtol=1e-5)
