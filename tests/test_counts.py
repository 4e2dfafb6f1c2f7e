"""How much batches count: outputs with different first axes, several uses, late calls."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    LOSSES,
    MODES,
    ComputeLoss,
    Lambda,
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
from keras import ops
from test_own_steps import NAMES, VAE, Example, OwnStep, descend

import keras_dwa
from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeighting, LossWeightScheduler


def halve(period, factors):
    """The first weight falls, the second one rises."""
    first, second = factors
    return {first: 1 / (1 + period), second: 1.0 + period}


@pytest.mark.parametrize(("update_freq", "regularizer"), [("epoch", "l2"), (2, None)])
def test_base_loss_of_a_model_that_stands_still_does(update_freq, regularizer):
    # Batches of 16, 16 and 8, whose losses differ much.
    x = np.where(np.arange(len(X)) < 32, 1.0, 30.0)[:, np.newaxis] * X
    schedule = LossWeightScheduler(
        {"easy": 2.0, "hard": 0.5}, lambda period: {"easy": 0.1 + 3 * period}, update_freq
    )
    model = dict_model(kernel_regularizer=regularizer)
    data = {"x": x, "validation_data": (x, Y), "validation_batch_size": 16}
    history = fit(compiled(model, schedule, 0.0), schedule, batch_size=16, **data)
    added = sum(float(keras.ops.convert_to_numpy(loss)) for loss in model.losses)
    check_base_loss(history, schedule.base_weights, added)
    for prefix in ("", "val_"):
        np.testing.assert_allclose(np.diff(history[f"{prefix}base_loss"]), 0.0, atol=1e-2)


# Outputs with different first axes.


class Graphs(keras.Model):
    """One output has a row per graph of a batch, the other a row per node."""

    def __init__(self):
        super().__init__()
        self.zeros = keras.layers.Dense(1, kernel_initializer="zeros")

    def call(self, x):
        nodes = self.zeros(x)
        return {"graph": ops.mean(nodes, axis=1), "node": ops.reshape(nodes, (-1, 1))}


def graphs(numbers_of_nodes):
    """Batches of two graphs. The loss of "graph" is 1, that of "node" 4."""
    for nodes in numbers_of_nodes:
        y = {"graph": np.ones((2, 1)), "node": np.full((2 * nodes, 1), 2.0)}
        yield np.ones((2, nodes, 1)), y


@pytest.mark.parametrize("eager", [False, True] if "eager" in MODES else [False])
def test_outputs_of_other_first_axes_have_their_own_averages(eager):
    schedule = LossWeightScheduler(["node", "graph"], halve, update_freq=2)
    model = compiled(
        Graphs(), schedule, 0.0, loss={"graph": "mse", "node": "mse"}, run_eagerly=eager
    )
    assign = Lambda(
        on_train_batch_begin=lambda batch, logs: batch == 1 and schedule.assign({"node": 0.25})
    )
    data = {"x": graphs([3, 1, 2, 1]), "y": None, "steps_per_epoch": 4}
    history = fit(model, schedule, assign, epochs=1, **data)
    np.testing.assert_allclose(history["base_loss"], [5.0], rtol=1e-5)
    assert len(schedule.windows) == 2
    for window in schedule.windows:
        np.testing.assert_allclose(list(window.losses.values()), [4.0, 1.0], rtol=1e-5)


# A compound loss that a step does not use exactly once.


def fit_still(model, *callbacks, validation=X, **arguments):
    """Three epochs with validation, at a learning rate of 0."""
    compiled(model, rate=0.0, **arguments)
    return fit(model, *callbacks, y=None, batch_size=8, validation_data=(validation,))


def check_still(history, uses=1.0):
    """The weights move, and what does not depend on them stays the same."""
    weights = np.array([history[f"{name}_weight"] for name in NAMES])
    np.testing.assert_allclose(weights, [[1, 1 / 2, 1 / 3], [1, 2, 3]], rtol=1e-6)
    for prefix in ("", "val_"):
        losses = np.array([history[f"{prefix}{name}_loss"] for name in NAMES])
        np.testing.assert_allclose(losses, losses[:, [0, 0, 0]], rtol=1e-5)
    check_base_loss(history, dict.fromkeys(NAMES, uses))


def test_two_views_of_a_batch_in_one_step():
    class Twice(VAE):
        def total(self, x, y_pred, terms, training):
            of_view = {name: 2.0 * term for name, term in terms.items()}
            return self.compound.combine(terms) + self.compound.combine(of_view)

    schedule = LossWeightScheduler(NAMES, halve)
    check_still(fit_still(Twice(schedule), schedule), uses=2.0)


class Critic(OwnStep):
    """Trains three times on each batch."""

    if BACKEND == "jax":

        def loss_and_state(self, trainable, non_trainable, metrics_variables, x):
            state = non_trainable, metrics_variables
            for _ in range(3):
                loss, state = super().loss_and_state(trainable, *state, x)
            return loss, state

    else:

        def train_step(self, x):
            def compute_loss():
                return self.compute_loss(x, y_pred=self(x, training=True))

            for _ in range(3):
                loss = descend(self, self.trainable_weights, compute_loss, self.optimizer)
            return self.log(x, loss)


def test_three_uses_in_a_train_step():
    schedule = LossWeightScheduler(NAMES, halve)
    check_still(fit_still(Critic(schedule), schedule))


class Sometimes(VAE):
    """Uses its compound loss in validation, and in steps whose number `uses` accepts."""

    steps = 0

    def total(self, x, y_pred, terms, training):
        self.steps += training
        is_used = not training or self.uses(self.steps)
        return self.compound.combine(terms) if is_used else ops.mean(y_pred["image"])


@deep_elsewhere
def test_step_in_which_nothing_is_used_is_no_batch():
    schedule = LossWeightScheduler(NAMES, halve, update_freq=1)
    model = Sometimes(schedule)
    model.uses = lambda step: step % 2 == 0
    history = fit_still(model, schedule, run_eagerly=True)
    assert [window.batches for window in schedule.windows] == [1] * 15
    used = [np.isfinite(window.losses["kl"]) for window in schedule.windows]
    assert used == [batch % 2 == 1 for batch in range(15)]
    errors = np.array(history["reconstruction_loss"]) - history["val_reconstruction_loss"]
    assert (abs(errors) < 10).all()


@pytest.mark.skipif(BACKEND == "jax", reason="on JAX, `metrics` must show the compound loss")
def test_validation_of_a_model_whose_metrics_hide_the_record_is_apart_from_training():
    class Validates(Example):
        def test_step(self, x):
            return self.log(x, self.compute_loss(x, y_pred=self(x), training=False))

    schedule = LossWeightScheduler(NAMES, halve)
    check_still(fit_still(Validates(schedule), schedule, validation=3 * X))


@one_backend
def test_epoch_without_a_use_after_the_first_holds_the_weights():
    dwa = DynamicWeightAverage(NAMES)
    model = compiled(Sometimes(dwa), run_eagerly=True)
    model.uses = lambda step: step <= 5
    with pytest.warns(UserWarning, match="epoch 2 did not use its compound loss"):
        history = fit(model, dwa, y=None, batch_size=8, epochs=2)
    assert len(history["kl_weight"]) == 1


@deep_elsewhere
def test_compound_loss_of_two_models_in_turn(dwa):
    first, second = ComputeLoss(dwa), ComputeLoss(LossWeighting(list(LOSSES)))
    second.compound = first.compound
    for model in (first, second):
        check_run(fit(compiled(model, dwa), dwa), dwa)


# What happens in parallel with the steps.


@deep_elsewhere
@pytest.mark.parametrize(
    ("hook", "is_first", "with_callback"),
    [
        ("on_train_begin", False, True),
        ("on_epoch_begin", True, False),
        ("on_epoch_begin", False, True),
        ("on_epoch_end", True, True),
        ("on_train_batch_end", False, True),
        ("on_test_end", False, True),
    ],
)
def test_evaluation_beside_the_batches_leaves_windows_and_logs_alone(hook, is_first, with_callback):
    if BACKEND == "jax" and keras.__version__ == "3.10.0" and hook.endswith("_begin"):
        pytest.skip("Keras 3.10 cannot evaluate there")

    def run(evaluates):
        keras.utils.set_random_seed(0)
        schedule = LossWeightScheduler(list(LOSSES), halve, update_freq=3)
        model = dict_model() if hook == "on_train_batch_end" else ComputeLoss(schedule)
        busy = []

        def evaluate(*args, **logs):
            if evaluates and not busy:
                busy.append(True)
                callbacks = [schedule] if with_callback else []
                model.evaluate(2 * X, Y, batch_size=8, verbose=0, callbacks=callbacks)
                busy.clear()

        compiled(model, schedule, 0.0)
        callbacks = [schedule, Lambda(**{hook: evaluate})][:: -1 if is_first else 1]
        return fit(model, *callbacks, validation_data=(X, Y)), schedule.windows

    (history, windows), (expected, expected_windows) = run(True), run(False)
    # Keras's own losses include an evaluation that begins within the epoch.
    is_within = hook in ("on_epoch_begin", "on_train_batch_end")
    for key in ("easy_weight", "val_base_loss") if is_within else expected:
        np.testing.assert_allclose(history[key], expected[key], rtol=1e-5)
    assert [window.weights for window in windows] == [w.weights for w in expected_windows]
    for window, other in zip(windows, expected_windows, strict=True):
        assert window.batches == other.batches
        np.testing.assert_allclose(window.losses["easy"], other.losses["easy"], rtol=1e-5)


@one_backend
def test_schedule_that_begins_with_all_losses_off_is_no_alarm():
    schedule = LossWeightScheduler(
        list(LOSSES), lambda period, factors: dict.fromkeys(factors, period / 10), update_freq=1
    )
    history = train(dict_model(), schedule, epochs=1)
    np.testing.assert_allclose(history["easy_weight"], [0.2], rtol=1e-6)


def test_weight_is_read_in_another_thread_beside_the_steps(dwa):
    stop = threading.Event()

    def look():
        read = set()
        while not stop.wait(0.001):
            read.add(float(dwa.loss_weights["easy"]))
        return read

    with ThreadPoolExecutor() as pool:
        watched = pool.submit(look)
        try:
            history = train(dict_model(), dwa, batch_size=1)
        finally:
            stop.set()
    check_run(history, dwa)
    assert {1.0, history["easy_weight"][-1]} <= watched.result()


class Beside(keras.callbacks.Callback):
    """Keras calls its `on_train_batch_end` in parallel with the next steps."""

    async_safe = True

    def __init__(self, on_train_batch_end):
        super().__init__()
        self.call = on_train_batch_end

    def on_train_batch_end(self, batch, logs=None):
        self.call(batch)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="on TensorFlow, Keras waits for each batch")
@pytest.mark.filterwarnings("ignore:.*CallbackList.__del__")  # Keras 3.10's own.
def test_ends_of_a_broken_fit_that_come_in_the_next_one_change_nothing():
    dwa = DynamicWeightAverage(list(LOSSES), temperature=0.2, update_freq=2)
    model, go_on = compiled(dict_model(), dwa), threading.Event()
    ended = threading.Semaphore(0)

    def break_off(batch, logs):
        if batch == 2:
            raise KeyboardInterrupt

    def let_the_others_end(batch):
        if batch == 4 and not go_on.is_set():
            go_on.set()
            for _ in range(2):
                assert ended.acquire(timeout=60)

    slow = Beside(lambda batch: go_on.wait(timeout=60))
    last = Beside(lambda batch: ended.release())
    with pytest.raises(KeyboardInterrupt):
        fit(model, slow, dwa, last, Lambda(on_train_batch_begin=break_off))
    dwa.reset()
    fit(model, dwa, Beside(let_the_others_end), epochs=4)
    assert [window.batches for window in dwa.windows] == [2] * 10


@deep_elsewhere
def test_hooks_return_at_once_after_the_first_batches():
    package = keras_dwa.__path__[0]

    def calls(batches):
        """The number of calls of the package's functions in an epoch of that many batches."""
        dwa, counted = DynamicWeightAverage(list(LOSSES)), []
        model = compiled(dict_model(), dwa)
        fit(model, dwa, epochs=1)

        def count(frame, event, argument):
            if event == "call" and frame.f_code.co_filename.startswith(package):
                counted.append(frame.f_code.co_name)

        previous = sys.getprofile()
        sys.setprofile(count)
        threading.setprofile(count)
        try:
            fit(model, dwa, epochs=1, batch_size=1, steps_per_epoch=batches)
        finally:
            sys.setprofile(previous)
            threading.setprofile(None)
        # An eager step itself reads and logs more.
        return len([name for name in counted if name not in ("value", "result")])

    assert calls(30) - calls(20) <= 3 * 10


@pytest.mark.skipif(BACKEND != "torch", reason="torch's compiler")
def test_compiled_stateless_combine_returns_what_all_batches_recorded():
    import torch

    dwa = DynamicWeightAverage(NAMES)
    compound = CompoundLoss(NAMES, dwa)

    @torch.compile
    def step(variables, terms):
        return compound.stateless_combine(variables, dict(zip(NAMES, terms, strict=True)), 2)

    variables = [variable.value for variable in dwa.variables]
    for batch in range(1, 4):
        loss, variables = step(variables, torch.tensor([float(batch), 1.0]).unbind())
        assert float(loss) == batch + 1
    assert variables[1].tolist() == [[12.0, 6.0, 6.0]] * 2
