"""Windows of N batches instead of epochs."""

import itertools
import math
from functools import partial

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    NAMES,
    ComputeLoss,
    Lambda,
    X,
    Y,
    check_base_loss,
    compiled,
    deep_elsewhere,
    dict_model,
    expected_weights,
    fit,
    heads,
    one_backend,
    our_messages,
)
from run_to_kill import Stop

from keras_dwa import DynamicWeightAverage, LossWeighting, LossWeightScheduler

BATCH = 8
BATCHES = len(X) // BATCH
BASE = {"easy": 2.0, "hard": 0.5}


@pytest.fixture(params=["compile", "compute_loss"])
def way(request):
    return request.param


def make(way, weighting, rate=0.05, **arguments):
    model = ComputeLoss(weighting) if way == "compute_loss" else dict_model()
    return compiled(model, weighting, rate, **arguments)


def start(way, update_freq, rate=0.05, **arguments):
    """A model that always starts with the same parameters, and its callback."""
    keras.utils.set_random_seed(0)
    dwa = DynamicWeightAverage(BASE, 0.2, update_freq)
    model = make(way, dwa, rate, **arguments)
    model(X)
    return model, dwa


def easy_losses(model):
    """The loss of each batch of an epoch, for a model that does not learn."""
    errors = model.predict(X, verbose=0)["easy"] - Y["easy"]
    return np.square(errors).reshape(BATCHES, BATCH).mean(1)


# Windows shorter and longer than an epoch; one ends together with it.
@pytest.mark.parametrize("size", [3, 7])
def test_weights_follow_windows_that_go_over_the_ends_of_epochs(way, size):
    (model, dwa), means = start(way, size), []
    look = Lambda(
        on_train_batch_end=lambda _, logs: means.append([logs[f"{name}_loss"] for name in NAMES])
    )
    history = fit(model, dwa, look, epochs=5)
    # Keras logs the means of an epoch's batches so far.
    sums = np.array(means).reshape(5, BATCHES, 2) * np.arange(1, BATCHES + 1)[:, None]
    losses = np.diff(sums, axis=1, prepend=0.0).reshape(-1, 2)
    averages = np.array([losses[k : k + size].mean(0) for k in range(0, len(losses), size)])
    by_name = {f"{name}_loss": averages[:, k] for k, name in enumerate(NAMES)}
    weights = expected_weights(by_name, dwa)

    closed = len(losses) // size
    assert {window.batches for window in dwa.windows} == {size}
    found = [list(window.losses.values()) for window in dwa.windows]
    np.testing.assert_allclose(found, averages[:closed], rtol=1e-4)
    found = [list(window.weights.values()) for window in dwa.windows]
    np.testing.assert_allclose(found, weights[:closed], rtol=1e-3)
    assert np.abs(found[-1] / weights[0] - 1).max() > 1e-2

    # The logs of the epochs.
    had = np.repeat(weights, size, axis=0)[: len(losses)]
    means = had.reshape(5, BATCHES, 2).mean(1).T
    np.testing.assert_allclose([history[f"{name}_weight"] for name in NAMES], means, rtol=1e-3)
    totals = (had * losses).sum(1).reshape(5, BATCHES).mean(1)
    np.testing.assert_allclose(history["loss"], totals, rtol=1e-3)
    check_base_loss(history, BASE)


def test_schedule_of_windows_weights_each_step(way):
    periods, kernels = [], []

    def alternate(period, factors):
        periods.append(period)
        return {"easy": period % 2, "hard": 1 - period % 2}

    def add_kernel(batch=None, logs=None):
        kernels.extend(w for w in schedule.model.get_weights() if w.shape == (6, 1))

    schedule = LossWeightScheduler(BASE, alternate, update_freq=1)
    model = make(way, schedule)
    model(X)
    history = fit(model, schedule, Lambda(on_train_batch_begin=add_kernel), epochs=2)
    add_kernel()
    moved = [(old != new).any() for old, new in itertools.pairwise(kernels)]
    assert moved == [False, True] * BATCHES
    assert sorted(set(periods)) == list(range(2 * BATCHES + 1))
    np.testing.assert_allclose(history["easy_weight"], [2.0 * 2 / 5, 2.0 * 3 / 5], rtol=1e-6)


@pytest.mark.skipif(BACKEND == "torch", reason="torch has no steps_per_execution")
def test_window_closes_at_the_first_call_that_has_seen_its_batches():
    schedule = LossWeightScheduler(BASE, lambda number: {"hard": number}, update_freq=3)
    history = fit(make("compile", schedule, steps_per_execution=2), schedule)
    # Calls of 2, 2 and 1 batches: windows end after 3, 6, 9, ... batches.
    assert [window.batches for window in schedule.windows] == [4, 3, 2, 3, 3]
    had = [0.5 * np.mean(n) for n in ([0, 0, 0, 0, 1], [1, 1, 2, 2, 3], [3, 3, 4, 4, 4])]
    np.testing.assert_allclose(history["hard_weight"], had, rtol=1e-6)


@deep_elsewhere
def test_checkpoint_within_a_window_resumes_bit_for_bit(tmp_path):
    model, dwa = start("compile", 7)
    files = f"{tmp_path}/{{epoch}}.weights.h5"
    save = keras.callbacks.ModelCheckpoint(files, save_weights_only=True)
    history = fit(model, dwa, save, epochs=5)
    resumed, again = start("compile", 7)
    resumed.optimizer.build(resumed.trainable_variables)
    again.set_model(resumed)
    resumed.load_weights(files.format(epoch=2))
    assert fit(resumed, again, initial_epoch=2, epochs=5) == {k: v[2:] for k, v in history.items()}
    assert again.windows == dwa.windows[1:]
    for ours, theirs in zip(resumed.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@deep_elsewhere
def test_window_continues_in_the_next_fit_and_starts_its_epoch_again_after_an_exception(way):
    model, dwa = start(way, 4)
    fit(model, dwa, epochs=1)
    assert dwa._weights.state.window[-1] == 1
    with pytest.raises(KeyboardInterrupt):
        fit(model, dwa, Stop(0, 3))
    assert [window.batches for window in dwa.windows] == [4, 4]
    fit(model, dwa, epochs=2)
    assert [window.batches for window in dwa.windows] == [4] * 4


@one_backend
def test_weights_that_do_not_reach_the_loss_are_found_in_windows_too(monkeypatch):
    schedule = LossWeightScheduler(NAMES, lambda period: {"hard": 1 + period % 2}, 1)
    monkeypatch.setattr(type(schedule.loss_weights["hard"]), "value", 1.0)
    with pytest.raises(ValueError, match=r"do not reach the loss.*'hard': 1\.4"):
        fit(make("compile", schedule), schedule)


@deep_elsewhere
def test_single_output_that_is_off_in_a_window_has_no_loss_there():
    """Keras logs only its weighted loss."""
    factors = [1.0, 0.5, 0.25, 0.0, 2.0, 1.0]
    inputs, outputs = heads()
    schedule = LossWeightScheduler({"easy": 3.0}, lambda period, _: {"easy": factors[period]}, 2)
    model = compiled(keras.Model(inputs, outputs["easy"]), schedule, 0.0, loss={"easy": "mse"})
    history = fit(model, schedule, y=Y["easy"], epochs=2)
    losses = easy_losses(keras.Model(inputs, outputs))
    np.testing.assert_allclose(history["base_loss"], [3 * losses.mean(), np.nan], rtol=1e-5)
    expected = np.tile(losses, 2).reshape(5, 2).mean(1)
    expected[3] = np.nan
    found = [window.losses["easy"] for window in schedule.windows]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_nan_holds_the_weights_and_stays_in_keras_sums_but_not_in_a_compound_loss(way):
    # This optimizer skips steps whose gradients are NaN.
    skips = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0))
    model, dwa = start(way, 1, optimizer=skips)
    poisoned = {**Y, "easy": np.where(np.arange(len(X))[:, None] < BATCH, np.nan, Y["easy"])}
    left_out = r"after 1 windows: .*'easy' \(nan\).*, so the window is left out"
    with pytest.warns(UserWarning, match=left_out) as warned:
        fit(model, dwa, y=poisoned, epochs=1)
    expected = easy_losses(model)
    expected[: BATCHES if way == "compile" else 1] = np.nan
    found = [window.losses["easy"] for window in dwa.windows]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert our_messages(warned)[0].count("left out") == np.isnan(expected).sum()
    assert all(math.isfinite(factor) for factor in dwa.factors.values())


@one_backend
def test_many_messages_of_an_epoch_are_cut():
    model, dwa = start("compile", 1)
    poisoned = {**Y, "easy": np.full_like(Y["easy"], np.nan)}
    with pytest.warns(UserWarning, match="has 3 more warnings for this epoch") as warned:
        fit(model, dwa, y=poisoned, epochs=1, batch_size=5)
    assert our_messages(warned)[0].count("left out") == 5


@one_backend
def test_window_that_the_run_does_not_fill_is_warned_of_once_at_its_end():
    model, dwa = start("compile", 100)
    with pytest.warns(UserWarning, match="update_freq=100.* only 10 were trained") as warned:
        fit(model, dwa, epochs=2)
    assert len(our_messages(warned)) == 1
    fit(model, dwa, epochs=1)


@one_backend
@pytest.mark.parametrize(
    ("hook", "known"), [("on_epoch_end", [True] * 3), ("on_train_batch_end", [False, True, True])]
)
def test_evaluation_that_takes_the_place_of_losses_is_warned_of(hook, known):
    model, dwa = start("compile", 4)
    look = Lambda(
        **{hook: lambda number, logs: number == 1 and look.model.evaluate(X, Y, verbose=0)}
    )
    with pytest.warns(UserWarning, match="an evaluation overwrote them.* before those that eva"):
        fit(model, look, dwa, epochs=3)
    assert [window.batches for window in dwa.windows] == [4, 4, 4]
    assert [math.isfinite(window.losses["easy"]) for window in dwa.windows] == known


@one_backend
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_data_that_ends_as_a_window_closes(way):
    """On JAX, Keras undoes what `on_train_batch_begin` assigned if no batch follows."""

    def batches():
        for k in range(0, len(X), BATCH):
            yield X[k : k + BATCH], {name: target[k : k + BATCH] for name, target in Y.items()}

    schedule = LossWeightScheduler(BASE, lambda period: {"easy": 1 / (1 + period)}, 5)
    model = make(way, schedule)
    for epoch in range(2):
        history = fit(model, schedule, x=batches(), y=None, epochs=1, validation_data=(X, Y))
        check_base_loss(history, BASE)
        window = schedule.windows[epoch]
        assert (window.batches, window.weights["easy"]) == (5, 2 / (1 + epoch))
        losses = [history[f"{name}_loss"][0] for name in NAMES]
        np.testing.assert_allclose(list(window.losses.values()), losses, rtol=1e-5)
        np.testing.assert_allclose(float(schedule.loss_weights["easy"]), 2 / (2 + epoch))


@deep_elsewhere
@pytest.mark.parametrize(("what", "first"), [("load", 2), ("reset_metrics", 0)])
def test_file_or_reset_within_an_epoch_begins_a_window(way, tmp_path, what, first):
    model, dwa = start(way, 3, 0.0)
    dwa.set_model(model)
    model.save_weights(file := tmp_path / "file.weights.h5")
    call = {"load": partial(model.load_weights, file), "reset_metrics": model.reset_metrics}[what]
    hook = "on_train_batch_begin" if first else "on_epoch_begin"
    look = Lambda(**{hook: lambda number, logs: number == first and call()})
    model.evaluate(X, Y, verbose=0, callbacks=[dwa])
    history = fit(model, dwa, look, epochs=1)
    (window,) = dwa.windows
    assert window.batches == 3
    expected = easy_losses(model)[first:][:3].mean()
    np.testing.assert_allclose(window.losses["easy"], expected, rtol=1e-5)
    check_base_loss(history, BASE)


@one_backend
def test_window_has_the_weights_of_its_last_batch_whatever_is_assigned_after_it():
    weighting = LossWeighting(BASE, update_freq=BATCHES)
    assign = Lambda(on_epoch_end=lambda epoch, logs: weighting.assign({"easy": 3.5}))
    fit(make("compile", weighting), assign, weighting, epochs=1)
    assert weighting.windows[0].weights == BASE


@one_backend
def test_step_in_a_loop_closes_a_window():
    dwa, epochs = DynamicWeightAverage(NAMES, update_freq=10), DynamicWeightAverage(NAMES)
    for losses in ({"easy": 2.0, "hard": 1.0}, {"easy": 1.0, "hard": 1.0}):
        assert dwa.step(losses) == epochs.step(losses)
    assert len(dwa.state["losses"]) == 2


@one_backend
@pytest.mark.parametrize("update_freq", [0, 2.0, True, "batch"])
def test_update_freq_is_epoch_or_a_whole_number_of_batches(update_freq):
    with pytest.raises(ValueError, match=f"Found `update_freq = {update_freq!r}`"):
        LossWeighting(NAMES, update_freq)


@one_backend
def test_latest_windows_are_kept():
    weighting = LossWeighting(NAMES, update_freq=1)
    weighting._windows.extend(range(1001))
    assert weighting.windows == list(range(1, 1001))
    weighting.reset()
    assert weighting.windows == []


@pytest.mark.skipif(BACKEND != "jax", reason="counts JAX's synchronizations")
def test_nothing_waits_for_the_device_between_the_ends_of_windows(way):
    def waits(weighting):
        counted = []

        class Counts(ComputeLoss if way == "compute_loss" else keras.Model):
            def jax_state_sync(self):
                counted.append(not self._jax_state_synced)
                super().jax_state_sync()

        model = Counts(*([weighting] if way == "compute_loss" else heads()))
        fit(compiled(model, weighting), weighting, epochs=3, batch_size=1)
        return sum(counted)

    # 120 batches, of which windows of 30 close three times within epochs.
    assert waits(LossWeighting(NAMES, 30)) - waits(LossWeighting(NAMES)) <= 3
