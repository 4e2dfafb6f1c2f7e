"""Windows of N batches in the place of epochs."""

import itertools
import math
import warnings

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    LOSSES,
    SAMPLES,
    ComputeLoss,
    X,
    Y,
    dict_model,
    heads,
    mode_of,
    one_backend,
    our_messages,
)

from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeighting, LossWeightScheduler

NAMES = list(LOSSES)
BATCH = 8
BATCHES = SAMPLES // BATCH
BASE = {"easy": 2.0, "hard": 0.5}


@pytest.fixture(params=["default", "eager"])
def mode(request):
    return mode_of(request)


@pytest.fixture(params=["compile", "compute_loss"])
def way(request):
    return request.param


def make(way, weighting, mode=None, optimizer=None):
    arguments = {"optimizer": optimizer or keras.optimizers.SGD(0.05), **(mode or {})}
    if way == "compute_loss":
        model = ComputeLoss(weighting)
        model.compile(**arguments)
    else:
        model = dict_model()
        model.compile(loss=LOSSES, loss_weights=weighting.loss_weights, **arguments)
    return model


class Batches(keras.callbacks.Callback):
    """Each batch's losses, out of the running means that Keras logs. Shape (batches, K)."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_epoch_begin(self, epoch, logs=None):
        self.means = []

    def on_train_batch_end(self, batch, logs=None):
        self.means.append([logs[f"{name}_loss"] for name in NAMES])

    def on_epoch_end(self, epoch, logs=None):
        sums = np.arange(1, len(self.means) + 1)[:, None] * self.means
        self.losses.extend(np.diff(sums, axis=0, prepend=0.0))


def fit(model, *callbacks, epochs=4, **arguments):
    arguments = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **arguments}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **arguments).history


def nash_mtl(losses, size, temperature):
    """The weights after each window, as in the code that published figures of DWA are from.

    There: w = mean(last `size` losses) / mean(`size` before), K * softmax(w / T); here at the ends
    of windows alone.
    """
    weights = [np.ones(losses.shape[1])]
    for end in range(size, len(losses) + 1, size):
        if end < 2 * size:
            weights.append(weights[-1])
            continue
        ratio = losses[end - size : end].mean(0) / losses[end - 2 * size : end - size].mean(0)
        exponentials = [math.exp(w / temperature) for w in ratio]
        weights.append(len(ratio) * np.array(exponentials) / sum(exponentials))
    return np.array(weights)


def by_batch(weights, size, batches):
    """The weights that each batch had. Shape (batches, K)."""
    return np.repeat(weights, size, axis=0)[:batches]


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_weights_follow_windows_that_go_over_the_ends_of_epochs(way, mode, size):
    dwa, batches = DynamicWeightAverage(BASE, 0.2, update_freq=size), Batches()
    history = fit(make(way, dwa, mode), dwa, batches, validation_split=0.0, epochs=5)
    losses = np.array(batches.losses)
    expected = nash_mtl(losses, size, 0.2) * list(BASE.values())
    found = np.array([list(window.weights.values()) for window in dwa.windows])
    assert len(found) == 5 * BATCHES // size
    np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-3)
    assert np.abs(found[-1] / list(BASE.values()) - 1).max() > 1e-2
    means = [losses[k * size : (k + 1) * size].mean(0) for k in range(len(found))]
    averages = [list(window.losses.values()) for window in dwa.windows]
    np.testing.assert_allclose(averages, means, rtol=1e-4)
    assert {window.batches for window in dwa.windows} == {size}

    # What the logs of the epochs have.
    had = by_batch(expected, size, len(losses)).reshape(5, BATCHES, -1)
    of_epochs = losses.reshape(5, BATCHES, -1)
    for k, name in enumerate(NAMES):
        np.testing.assert_allclose(history[f"{name}_weight"], had[..., k].mean(1), rtol=1e-3)
    np.testing.assert_allclose(history["loss"], (had * of_epochs).sum(2).mean(1), rtol=1e-3)
    base = sum(BASE[name] * np.array(history[f"{name}_loss"]) for name in NAMES)
    np.testing.assert_allclose(history["base_loss"], base, rtol=1e-5)


def test_windows_of_25_are_as_in_the_published_code():
    dwa, batches = DynamicWeightAverage(NAMES, 2.0, update_freq=25), Batches()
    fit(make("compile", dwa), dwa, batches, batch_size=1, epochs=4)
    expected = nash_mtl(np.array(batches.losses), 25, 2.0)
    found = [list(window.weights.values()) for window in dwa.windows]
    np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-4)
    assert len(found) == 4 * SAMPLES // 25


def test_batches_of_unequal_sizes_count_as_keras_counts_them(way):
    dwa = DynamicWeightAverage(NAMES, 0.2, update_freq=2)
    mode = {"run_eagerly": BACKEND == "tensorflow" and way == "compile"}  # Else it takes no sizes.
    model = make(way, dwa, mode, keras.optimizers.SGD(0.0))
    history = fit(model, dwa, batch_size=32, epochs=2)  # 32 and 8.
    for window, epoch in zip(dwa.windows, range(2), strict=True):
        for name in NAMES:
            np.testing.assert_allclose(
                window.losses[name], history[f"{name}_loss"][epoch], rtol=1e-5
            )


@pytest.mark.skipif(BACKEND == "torch", reason="Keras takes no steps_per_execution on torch")
def test_window_closes_at_the_first_call_that_has_seen_its_batches(way):
    dwa = DynamicWeightAverage(NAMES, 0.2, update_freq=5)
    fit(make(way, dwa, {"steps_per_execution": 2}), dwa, batch_size=4, epochs=3)
    assert [window.batches for window in dwa.windows] == [6] * 5
    # Calls of 2, 2 and 1 batches.
    dwa = DynamicWeightAverage(NAMES, 0.2, update_freq=3)
    fit(make(way, dwa, {"steps_per_execution": 2}), dwa, epochs=4)
    assert [window.batches for window in dwa.windows] == [4, 3, 3, 4, 3, 3]


def test_validation_and_evaluations_leave_windows_alone(way):
    def weights_of(*callbacks, **arguments):
        keras.utils.set_random_seed(0)
        dwa = DynamicWeightAverage(NAMES, 0.2, update_freq=3)
        model = make(way, dwa)
        model(X)
        look = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: model.evaluate(X, Y, verbose=0)
        )
        fit(model, dwa, *[look] * len(callbacks), **arguments)
        return dwa.windows

    expected = weights_of()
    for found in (
        weights_of(validation_data=(X, Y)),
        weights_of(validation_data=(X, Y), validation_freq=2),
        weights_of("look"),
    ):
        assert found == expected
    assert len(expected) == 6


def test_checkpoint_within_a_window_resumes_bit_for_bit(way, tmp_path):
    def start():
        keras.utils.set_random_seed(0)
        dwa = DynamicWeightAverage(NAMES, 0.2, update_freq=7)
        model = make(way, dwa, optimizer=keras.optimizers.Adam(0.01))
        model(X)
        model.optimizer.build(model.trainable_variables)
        return model, dwa

    model, dwa = start()
    file = tmp_path / "3.weights.h5"
    save = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: epoch == 2 and model.save_weights(file)
    )
    history = fit(model, dwa, save, epochs=6)
    resumed, again = start()
    again.set_model(resumed)
    resumed.load_weights(file)
    assert again._weights.state.window[-1] == 1
    assert fit(resumed, again, initial_epoch=3, epochs=6) == {k: v[3:] for k, v in history.items()}
    assert again.windows == dwa.windows[2:]
    for ours, theirs in zip(resumed.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_window_goes_on_in_the_next_fit_and_starts_its_epoch_again_after_an_exception(way):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3:
                raise KeyboardInterrupt

    dwa = DynamicWeightAverage(NAMES, 0.2, update_freq=4)
    model = make(way, dwa)
    fit(model, dwa, epochs=1)
    assert dwa._weights.state.window[-1] == 1
    with pytest.raises(KeyboardInterrupt):
        fit(model, dwa, Stop(), epochs=1)
    assert [window.batches for window in dwa.windows] == [4, 4]
    fit(model, dwa, epochs=2)
    assert {window.batches for window in dwa.windows} == {4}


@pytest.mark.parametrize("shape", ["compile", "compute_loss"])
def test_schedule_gets_the_number_of_windows(shape):
    seen = []

    def anneal(period, factors):
        seen.append(period)
        return {"hard": min(1.0, period / 10)}

    schedule = LossWeightScheduler(BASE, anneal, update_freq=1)
    history = fit(make(shape, schedule), schedule, epochs=3)
    steps = np.minimum(1.0, np.arange(15) / 10).reshape(3, 5) * BASE["hard"]
    np.testing.assert_allclose(history["hard_weight"], steps.mean(1), rtol=1e-6)
    assert sorted(set(seen)) == list(range(16))
    base = sum(BASE[name] * np.array(history[f"{name}_loss"]) for name in NAMES)
    np.testing.assert_allclose(history["base_loss"], base, rtol=1e-5)


def test_parameters_move_by_the_weights_of_each_step(way):
    schedule = LossWeightScheduler(
        NAMES, lambda period, _: {"hard": float(period % 2), "easy": 1.0 - period % 2}, 1
    )
    model, kernels = make(way, schedule), []
    model(X)
    look = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: kernels.append(
            [np.array(w) for w in look.model.get_weights()]
        )
    )
    fit(model, schedule, look, epochs=1)
    (k,) = (k for k, w in enumerate(model.get_weights()) if w.shape == (6, 1))
    moved = [np.abs(new[k] - old[k]).max() > 0 for old, new in itertools.pairwise(kernels)]
    assert moved == [True, False, True, False]


def test_factors_assigned_within_an_epoch_keep_base_loss_exact(way):
    weighting = LossWeighting(BASE)

    class Halve(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            weighting.assign({"easy": 0.5**batch})

    history = fit(make(way, weighting), weighting, Halve(), epochs=2)
    base = sum(BASE[name] * np.array(history[f"{name}_loss"]) for name in NAMES)
    np.testing.assert_allclose(history["base_loss"], base, rtol=1e-5)
    expected = BASE["easy"] * np.mean([0.5**batch for batch in range(BATCHES)])
    np.testing.assert_allclose(history["easy_weight"], expected, rtol=1e-6)


def test_ignored_weights_are_found_in_windows_too():
    class Ignores(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            super().compute_loss(x, y, y_pred, sample_weight)
            easy = keras.ops.mean(keras.ops.square(y["easy"] - y_pred["easy"]))
            return easy + keras.ops.mean(keras.ops.abs(y["hard"] - y_pred["hard"]))

    dwa = DynamicWeightAverage(NAMES, 0.02, update_freq=1)
    model = Ignores(*heads())
    model.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=dwa.loss_weights)
    with pytest.raises(ValueError, match="do not reach the loss"):
        fit(model, dwa)


def test_single_output_in_windows():
    inputs, outputs = heads()
    model = keras.Model(inputs, outputs["easy"])
    squares = (np.asarray(model.predict(X, verbose=0)) - Y["easy"]) ** 2
    halving = LossWeightScheduler(["easy"], lambda period, factors: {"easy": 0.5**period}, 2)
    still = keras.optimizers.SGD(0.0)
    model.compile(still, {"easy": "mse"}, loss_weights=halving.loss_weights)
    history = model.fit(
        X, Y["easy"], batch_size=BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[halving]
    ).history
    expected = np.array([0.5 ** (batch // 2) for batch in range(10)]).reshape(2, 5)
    np.testing.assert_allclose(history["easy_weight"], expected.mean(1), rtol=1e-6)
    np.testing.assert_allclose(
        history["base_loss"], np.mean([squares.mean() for _ in range(2)]), rtol=1e-5
    )
    for k, window in enumerate(halving.windows):
        batches = [b % 5 for b in (2 * k, 2 * k + 1)]
        expected = np.mean([squares[8 * b : 8 * b + 8].mean() for b in batches])
        np.testing.assert_allclose(window.losses["easy"], expected, rtol=1e-5)


def test_nan_in_a_window_holds_the_weights_and_is_named(way):
    dwa = DynamicWeightAverage(NAMES, 0.2, update_freq=2)
    poisoned = {**Y, "easy": np.where(np.arange(SAMPLES)[:, None] < 8, np.nan, Y["easy"])}
    model = make(way, dwa, optimizer=keras.optimizers.SGD(0.0))
    with pytest.warns(
        UserWarning, match="after 1 windows: .*'easy'.*; the window is left out"
    ) as w:
        model.fit(X, poisoned, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[dwa])
    assert len(our_messages(w)) >= 1
    assert all(math.isfinite(factor) for factor in dwa.factors.values())


@pytest.mark.parametrize("epochs", [1, 2])
def test_window_that_the_run_does_not_fill_is_warned_of_once_at_its_end(epochs):
    dwa = DynamicWeightAverage(NAMES, update_freq=100)
    model = make("compile", dwa)
    with pytest.warns(UserWarning, match=f"update_freq=100.*{5 * epochs} that were") as warned:
        fit(model, dwa, epochs=epochs)
    assert len(our_messages(warned)) == 1
    fit(model, dwa, epochs=1)


def test_evaluation_before_the_callback_costs_the_sums_of_the_epochs_end_alone():
    dwa = DynamicWeightAverage(NAMES, 0.2, update_freq=4)
    model = make("compile", dwa)
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: model.evaluate(X, Y, verbose=0)
    )
    with pytest.warns(UserWarning, match="list the weighting before"):
        fit(model, look, dwa, epochs=3)
    assert [window.batches for window in dwa.windows] == [4, 4, 4]
    assert all(math.isfinite(loss) for window in dwa.windows for loss in window.losses.values())


def test_evaluation_within_an_epoch_is_warned_of():
    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                self.model.evaluate(X, Y, verbose=0)

    dwa = DynamicWeightAverage(NAMES, 0.2, update_freq=4)
    with pytest.warns(UserWarning, match="an evaluation took their place"):
        fit(make("compile", dwa), dwa, Look(), epochs=1)


@pytest.mark.parametrize("update_freq", ["epoch", 2])
def test_one_output_beside_a_number(update_freq):
    class Double(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            weighting.assign({"easy": 1.0 + batch})

    weighting = LossWeighting({"easy": 4.0}, update_freq)
    model = dict_model()
    weights = {**weighting.loss_weights, "hard": 0.5}
    model.compile(keras.optimizers.SGD(0.0), LOSSES, loss_weights=weights)
    history = fit(model, weighting, Double(), epochs=2)
    base = 4 * np.array(history["easy_loss"]) + 0.5 * np.array(history["hard_loss"])
    np.testing.assert_allclose(history["base_loss"], base, rtol=1e-5)


def test_single_output_that_is_off_in_some_windows_is_no_alarm():
    inputs, outputs = heads()
    model = keras.Model(inputs, outputs["easy"])
    blinking = LossWeightScheduler(["easy"], lambda period, _: {"easy": 2.0 * (period % 2)}, 1)
    model.compile("sgd", {"easy": "mse"}, loss_weights=blinking.loss_weights)
    model.fit(X, Y["easy"], batch_size=BATCH, epochs=2, verbose=0, callbacks=[blinking])
    losses = [window.losses["easy"] for window in blinking.windows]
    assert [math.isfinite(loss) for loss in losses] == [False, True] * 5


def test_data_that_ends_as_a_window_closes(way):
    """On JAX, Keras then puts back what was assigned as a batch began that there is not."""

    def batches():
        for start in range(0, SAMPLES, BATCH):
            some = slice(start, start + BATCH)
            yield X[some], {name: target[some] for name, target in Y.items()}

    # TensorFlow counts a batch more in each output's loss than there was, with such data.
    counts_right = BACKEND != "tensorflow" or way == "compute_loss"
    dwa = DynamicWeightAverage(BASE, 0.2, update_freq=5)
    model = make(way, dwa)
    histories = []
    for _ in range(4):
        arguments = {"validation_data": (X, Y), "validation_batch_size": BATCH, "shuffle": False}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Your input ran out of data")
            fitted = model.fit(batches(), epochs=1, verbose=0, callbacks=[dwa], **arguments)
        histories.append(fitted.history)
    for history in histories:
        base = sum(BASE[name] * history[f"val_{name}_loss"][0] for name in NAMES)
        np.testing.assert_allclose(history["val_base_loss"], [base], rtol=1e-5)
        if counts_right:
            base = sum(BASE[name] * history[f"{name}_loss"][0] for name in NAMES)
            np.testing.assert_allclose(history["base_loss"], [base], rtol=1e-5)
    assert [window.batches for window in dwa.windows] == [5] * 4
    for window, history in zip(dwa.windows, histories, strict=True):
        total = sum(window.weights[name] * window.losses[name] for name in NAMES)
        np.testing.assert_allclose(total, history["loss"], rtol=1e-4 if counts_right else 0.5)
    assert {k: float(w) for k, w in dwa.loss_weights.items()} == pytest.approx(
        {name: BASE[name] * factor for name, factor in dwa.factors.items()}, rel=1e-5
    )


def test_windows_after_one_of_nan_are_their_own_with_a_compound_loss():
    class Nan(ComputeLoss):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            nothing = 0.0 * sum(keras.ops.mean(output) for output in y_pred.values())
            easy = keras.ops.mean(y["easy"]) + nothing
            return self.compound.combine({"easy": easy, "hard": keras.ops.mean(y["hard"] ** 2)})

    dwa = DynamicWeightAverage(NAMES, update_freq=1)
    poisoned = {**Y, "easy": np.where(np.arange(SAMPLES)[:, None] < 8, np.nan, 1.0)}
    model = Nan(dwa)
    model.compile(keras.optimizers.SGD(0.0))
    with pytest.warns(UserWarning, match="the window is left out") as warned:
        model.fit(X, poisoned, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[dwa])
    losses = [window.losses["easy"] for window in dwa.windows]
    np.testing.assert_allclose(losses, [np.nan, 1, 1, 1, 1], rtol=1e-6)
    assert our_messages(warned)[0].count("left out") == 1


def test_many_messages_of_an_epoch_are_cut():
    dwa = DynamicWeightAverage(NAMES, update_freq=1)
    poisoned = {**Y, "easy": np.full_like(Y["easy"], np.nan)}
    model = make("compile", dwa, optimizer=keras.optimizers.SGD(0.0))
    with pytest.warns(UserWarning, match="has 35 more messages of this epoch") as warned:
        model.fit(X, poisoned, batch_size=1, verbose=0, callbacks=[dwa])
    assert our_messages(warned)[0].count("left out") == 5


@pytest.mark.parametrize("call", ["reset_metrics", "reset"])
def test_calls_as_an_epoch_begins_leave_its_windows_alone(call):
    dwa = DynamicWeightAverage(NAMES, 0.2, update_freq=3)
    model = make("compile", dwa, optimizer=keras.optimizers.SGD(0.0))

    def begin(epoch, logs):
        (dwa.reset if call == "reset" else model.reset_metrics)()

    look = keras.callbacks.LambdaCallback(on_epoch_begin=begin)
    model.evaluate(X, Y, batch_size=SAMPLES, verbose=0, callbacks=[dwa])
    history = fit(model, dwa, look, epochs=1)
    (window,) = dwa.windows
    assert window.batches == 3
    for name in NAMES:
        tail = dwa._weights.state.window[NAMES.index(name)]
        count = dwa._weights.state.window[2]
        whole = (3 * window.losses[name] + 2 * tail / count) / 5
        np.testing.assert_allclose(whole, history[f"{name}_loss"][0], rtol=1e-5)


def test_reset_within_an_epoch_begins_a_window():
    dwa = DynamicWeightAverage(NAMES, 0.2, update_freq=3)
    reset = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: batch == 2 and dwa.reset()
    )
    fit(make("compile", dwa), dwa, reset, epochs=1)
    assert [window.batches for window in dwa.windows] == [3]


@one_backend
def test_hooks_called_by_hand_have_no_sums_and_the_mean_goes_by_batches():
    weighting = LossWeighting(BASE)
    model = make("compile", weighting)
    callbacks = keras.callbacks.CallbackList([weighting], add_history=True, model=model)
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(0)
    for batch in range(3):
        callbacks.on_train_batch_begin(batch)
        weighting.assign({"easy": float(batch)})
        callbacks.on_train_batch_end(batch)
    callbacks.on_epoch_end(0, {"loss": 3.0, "easy_loss": 1.0, "hard_loss": 2.0})
    callbacks.on_train_end()
    assert model.history.history["easy_weight"] == [2.0 * (0 + 1 + 2) / 3]


@one_backend
def test_step_in_a_loop_closes_a_window():
    dwa, epochs = (DynamicWeightAverage(NAMES, 0.2, update_freq=f) for f in (10, "epoch"))
    for losses in ({"easy": 2.0, "hard": 1.0}, {"easy": 1.0, "hard": 1.0}):
        assert dwa.step(losses) == epochs.step(losses)
    assert dwa._weights.state.periods == 2


@one_backend
@pytest.mark.parametrize("update_freq", [0, -1, 2.0, True, "batch", None])
def test_update_freq_is_epoch_or_a_whole_number_of_batches(update_freq):
    with pytest.raises(ValueError, match=f"Found `update_freq = {update_freq!r}`"):
        LossWeighting(NAMES, update_freq)


@one_backend
def test_latest_windows_are_kept():
    weighting = LossWeighting(NAMES, update_freq=1)
    fit(make("compile", weighting), weighting, epochs=13, batch_size=1, initial_epoch=0)
    fit(make("compile", weighting), epochs=0)
    assert len(weighting.windows) == 13 * SAMPLES
    weighting.reset()
    assert weighting.windows == []
    for _ in range(1001):
        weighting._windows.append(None)
    assert len(weighting.windows) == 1000


def test_record_of_a_compound_loss_is_exact_however_long_the_epoch():
    weighting = LossWeighting(NAMES, update_freq=10)
    compound, weights = CompoundLoss(NAMES, weighting), weighting._weights
    # As after so many batches that a sum in float32 does not know their losses' digits.
    compound.combine({"easy": 1.0, "hard": 1.0}, samples=2.0**24)
    weights.fold()
    before = weights.recorded()
    compound.combine({"easy": 0.3, "hard": 0.7}, samples=1.0)
    after = weights.recorded()
    new = after[0, :-1] * after[0, -1] - before[0, :-1] * before[0, -1]
    np.testing.assert_allclose(new, [0.3, 0.7], rtol=1e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="counts JAX's synchronizations")
def test_nothing_waits_for_the_device_between_the_ends_of_windows(way):
    def syncs(weighting):
        counted = []

        class Counts(ComputeLoss if way == "compute_loss" else keras.Model):
            def jax_state_sync(self):
                counted.append(not self._jax_state_synced)
                super().jax_state_sync()

        if way == "compute_loss":
            model = Counts(weighting)
            model.compile("sgd")
        else:
            model = Counts(*heads())
            model.compile("sgd", LOSSES, loss_weights=weighting.loss_weights)
        fit(model, weighting, epochs=3, batch_size=1)
        return sum(counted)

    # 120 batches, of which windows of 30 close three times within epochs.
    assert syncs(LossWeighting(NAMES, 30)) - syncs(LossWeighting(NAMES)) <= 3
