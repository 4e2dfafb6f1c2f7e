"""A schedule of factors: those of the epoch that begins, the first included."""

import itertools
import pickle
import re

import cloudpickle
import keras
import numpy as np
import pytest
from common import BACKEND, LOSSES, X, Y, dict_model, one_backend, train
from loops import train_loop

from keras_dwa import CompoundLoss, LossWeightScheduler

NAMES = ["easy", "hard"]


def ramp(epoch, factors):
    return {"hard": epoch / 4}


def grow(epoch, factors):
    return {"hard": 2.0 * factors["hard"]}


def phases(epoch, factors):
    return {"hard": float(3 <= epoch < 6)}


def test_schedule_gives_the_factors_of_every_epoch(mode):
    scheduler = LossWeightScheduler({"easy": 1.0, "hard": 4.0}, ramp)
    history = train(dict_model(), scheduler, mode=mode, epochs=4, validation_split=0.2)
    assert history["hard_weight"] == [0.0, 1.0, 2.0, 3.0]
    assert history["easy_weight"] == [1.0] * 4
    for prefix in ("", "val_"):
        easy, hard = (np.array(history[f"{prefix}{name}_loss"]) for name in NAMES)
        total = easy + np.array(history["hard_weight"]) * hard
        np.testing.assert_allclose(history[f"{prefix}loss"], total, rtol=1e-5)
        np.testing.assert_allclose(history[f"{prefix}base_loss"], easy + 4 * hard, rtol=1e-5)


def test_head_does_not_move_in_the_phases_in_which_it_is_off(mode):
    scheduler = LossWeightScheduler(NAMES, phases)
    heads = []

    class Heads(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            heads.append(np.concatenate([w.ravel() for w in model.get_layer("hard").get_weights()]))

        def on_train_end(self, logs=None):
            self.on_epoch_begin(None)

    model = dict_model()
    train(model, scheduler, mode=mode, epochs=8, batch_size=20, others=[Heads()])
    moved = [not np.array_equal(*pair) for pair in itertools.pairwise(heads)]
    assert moved == [3 <= epoch < 6 for epoch in range(8)]


class Autoencoder(keras.Model):
    """A reconstruction and the divergence of a code, or the reconstruction alone."""

    def __init__(self, weighting=None):
        super().__init__()
        self.encoder, self.decoder = keras.layers.Dense(2), keras.layers.Dense(4)
        self.compound = weighting and CompoundLoss(["reconstruction", "kl"], weighting)
        self.traces = 0

    def call(self, inputs):
        code = self.encoder(inputs)
        return {"code": code, "image": self.decoder(code)}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        self.traces += training
        reconstruction = keras.ops.mean(keras.ops.square(x - y_pred["image"]))
        if self.compound is None:
            return reconstruction
        kl = keras.ops.mean(keras.ops.square(y_pred["code"]))
        return self.compound.combine({"reconstruction": reconstruction, "kl": kl})


def test_annealed_term_is_absent_at_zero_and_ramps_up_without_a_trace(mode):
    def parameters(weighting, epochs):
        keras.utils.set_random_seed(0)
        model = Autoencoder(weighting)
        model.compile(keras.optimizers.SGD(0.1), **mode)
        callbacks = [weighting] if weighting else []
        fit = {"batch_size": 8, "shuffle": False, "verbose": 0, "epochs": epochs}
        history = model.fit(X, validation_data=(X,), callbacks=callbacks, **fit).history
        return model, history

    def annealing():
        weights = {"reconstruction": 1.0, "kl": 4.0}
        return LossWeightScheduler(weights, lambda epoch, factors: {"kl": max(0, epoch - 1) / 2})

    off, _ = parameters(annealing(), 2)
    alone, _ = parameters(None, 2)
    for ours, without in zip(off.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(ours, without, rtol=1e-6, atol=1e-7)

    model, history = parameters(annealing(), 4)
    assert history["kl_weight"] == [0.0, 0.0, 2.0, 4.0]
    assert any((a != b).any() for a, b in zip(model.get_weights(), off.get_weights(), strict=True))
    terms = np.array(history["val_reconstruction_loss"]) + 4 * np.array(history["val_kl_loss"])
    np.testing.assert_allclose(history["val_base_loss"], terms, rtol=1e-5)
    if BACKEND != "torch" and not mode.get("run_eagerly"):
        assert model.traces == off.traces


@one_backend
def test_schedule_whose_weights_do_not_reach_the_loss_is_found_in_the_first_epoch():
    class Unweighted(Autoencoder):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            super().compute_loss(x, y, y_pred, sample_weight, training)
            errors = keras.ops.square(x - y_pred["image"])
            return keras.ops.mean(errors) + keras.ops.mean(keras.ops.square(y_pred["code"]))

    scheduler = LossWeightScheduler(["reconstruction", "kl"], lambda epoch, factors: {"kl": 0.0})
    model = Unweighted(scheduler)
    model.compile("sgd")
    with pytest.raises(ValueError, match=r"do not reach the loss.*'kl': 0\.0"):
        model.fit(X, batch_size=8, verbose=0, callbacks=[scheduler])


@pytest.mark.parametrize("compiled", [True, False])
def test_loop_has_the_factors_of_epoch_0_from_the_start_and_step_goes_on(compiled):
    scheduler = LossWeightScheduler({"easy": 1.0, "hard": 4.0}, ramp)
    compound = CompoundLoss(LOSSES, scheduler)
    optimizer = keras.optimizers.SGD(0.05)
    weights = train_loop(dict_model(), optimizer, compound, scheduler, X, Y, 3, 20, compiled)
    np.testing.assert_array_equal(weights, [[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    assert scheduler._weights.state.epochs == 3


@one_backend
def test_step_goes_on_without_any_losses():
    scheduler = LossWeightScheduler(NAMES, ramp)
    assert scheduler.factors == {"easy": 1.0, "hard": 0.0}
    assert scheduler.step() == {"easy": 1.0, "hard": 0.25}
    assert scheduler.step({"easy": 1.0, "hard": 2.0}) == {"easy": 1.0, "hard": 0.5}
    with pytest.raises(ValueError, match="takes one loss per output"):
        scheduler.step({"easy": 1.0})
    scheduler.reset()
    assert scheduler.factors == {"easy": 1.0, "hard": 0.0}
    assert scheduler.step()["hard"] == 0.25


@one_backend
def test_schedule_gets_the_factors_of_the_epoch_before_once_for_each_epoch():
    scheduler = LossWeightScheduler(NAMES, grow)
    model = dict_model()
    assert train(model, scheduler)["hard_weight"] == [2.0, 4.0, 8.0]
    # A second model starts afresh, and the same one goes on.
    assert train(dict_model(), scheduler)["hard_weight"] == [2.0, 4.0, 8.0]


@one_backend
def test_factors_that_a_schedule_leaves_out_may_be_assigned():
    scheduler = LossWeightScheduler(NAMES, ramp)
    scheduler.assign({"easy": 5.0, "hard": 7.0})
    history = train(dict_model(), scheduler, epochs=2)
    assert (history["easy_weight"], history["hard_weight"]) == ([5.0, 5.0], [0.0, 0.25])
    scheduler.assign({"easy": 6.0})
    assert scheduler.step() == {"easy": 6.0, "hard": 0.5}


@one_backend
def test_schedule_may_change_the_factors_that_it_got_and_hold_them():
    def change(epoch, factors):
        if epoch == 2:
            return None
        factors["hard"] += 1
        return factors

    history = train(dict_model(), LossWeightScheduler(NAMES, change), epochs=4)
    assert history["hard_weight"] == [2.0, 3.0, 3.0, 4.0]


@one_backend
@pytest.mark.parametrize("save_freq", ["epoch", 7])
def test_resumed_run_has_the_factors_of_the_epoch_that_comes_next(tmp_path, save_freq):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if scheduler.factors["hard"] == 4.0 and batch == 3:
                raise KeyboardInterrupt

    def fit(*others):
        model = dict_model()
        backup = keras.callbacks.BackupAndRestore(tmp_path, save_freq)
        return train(model, scheduler, others=[backup, *others])

    scheduler = LossWeightScheduler(NAMES, grow)
    with pytest.raises(KeyboardInterrupt):
        fit(Stop())
    # The same outputs in another order.
    scheduler = LossWeightScheduler(NAMES[::-1], grow)
    assert fit()["hard_weight"] == [4.0, 8.0]


@one_backend
def test_pickled_scheduler_goes_on():
    scheduler = LossWeightScheduler(NAMES, grow)
    scheduler.step()
    for module in (pickle, cloudpickle):
        assert module.loads(module.dumps(scheduler)).step()["hard"] == 8.0
    # Within `fit`, too.
    pickled = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: files.append(pickle.dumps(scheduler))
    )
    files = []
    train(dict_model(), scheduler, epochs=1, others=[pickled])
    assert pickle.loads(files[0]).step()["hard"] == 4.0


@one_backend
def test_schedule_may_begin_at_any_epoch():
    model, scheduler = dict_model(), LossWeightScheduler(NAMES, ramp)
    fit = {"initial_epoch": 4, "epochs": 6}
    assert train(model, scheduler, **fit)["hard_weight"] == [1.0, 1.25]


@one_backend
def test_schedule_that_failed_once_goes_on():
    def schedule(epoch, factors):
        if fails:
            raise KeyboardInterrupt
        return {"hard": epoch / 4}

    fails = False
    scheduler = LossWeightScheduler(NAMES, schedule)
    scheduler.step()
    fails = True
    with pytest.raises(KeyboardInterrupt):
        scheduler.reset()
    fails = False
    assert scheduler.step() == {"easy": 1.0, "hard": 0.0}
    fails = True
    with pytest.raises(KeyboardInterrupt):
        scheduler.reset()
    fails = False
    scheduler.assign({"easy": 3.0})
    assert scheduler.step() == {"easy": 3.0, "hard": 0.25}


@one_backend
def test_verbose_prints_the_weights_at_the_start_of_each_epoch(capsys):
    train(dict_model(), LossWeightScheduler(NAMES, ramp, verbose=1), epochs=2)
    assert capsys.readouterr().out == (
        "\nEpoch 1: LossWeightScheduler setting loss weights to easy: 1.0000, hard: 0.0000.\n"
        "\nEpoch 2: LossWeightScheduler setting loss weights to easy: 1.0000, hard: 0.2500.\n"
    )
    train(dict_model(), LossWeightScheduler(NAMES, ramp), epochs=1)
    assert capsys.readouterr().out == ""


@one_backend
@pytest.mark.parametrize("schedule", [None, {"hard": 0.5}, 0.5])
def test_schedule_must_be_a_function(schedule):
    with pytest.raises(ValueError, match=re.escape(f"Found `schedule = {schedule!r}`")):
        LossWeightScheduler(NAMES, schedule)


@one_backend
@pytest.mark.parametrize(("returned", "found"), [({"hard": -1.0}, "-1.0 for 'hard'"), (3, "3.")])
def test_schedule_that_returns_nonsense_leaves_the_weights_as_they_were(returned, found):
    def schedule(epoch, factors):
        return {"hard": 0.5} if epoch == 0 else returned

    scheduler = LossWeightScheduler(NAMES, schedule)
    source = f"`LossWeightScheduler.schedule` for epoch 2 gave {found}"
    with pytest.raises(ValueError, match=re.escape(source)):
        train(dict_model(), scheduler)
    assert scheduler.factors == {"easy": 1.0, "hard": 0.5}


@one_backend
def test_step_within_fit_is_an_error():
    scheduler = LossWeightScheduler(NAMES, ramp)
    read = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: scheduler.step())
    with pytest.raises(RuntimeError, match=r"which `fit` does itself.*\n.*weighting.loss_weights"):
        train(dict_model(), scheduler, others=[read])
