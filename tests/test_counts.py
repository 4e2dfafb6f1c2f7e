"""How much batches count: outputs with different first axes, several uses, late calls."""

import cProfile

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    LOSSES,
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
from test_own_steps import NAMES, VAE, Example

from keras_dwa import DynamicWeightAverage, LossWeighting, LossWeightScheduler


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


@pytest.mark.parametrize("names", [["graph", "node"], ["node", "graph"]])
def test_outputs_of_other_first_axes_have_their_own_averages(names):
    schedule = LossWeightScheduler(names, halve, update_freq=2)
    model = compiled(Graphs(), schedule, 0.0, loss={"graph": "mse", "node": "mse"})
    assign = Lambda(
        on_train_batch_begin=lambda batch, logs: batch == 1 and schedule.assign({"node": 0.25})
    )
    data = {"x": graphs([3, 1, 2, 1]), "y": None, "steps_per_epoch": 4}
    history = fit(model, schedule, assign, epochs=1, **data)
    np.testing.assert_allclose(history["base_loss"], [5.0], rtol=1e-5)
    expected = pytest.approx({"graph": 1.0, "node": 4.0}, rel=1e-5)
    assert [window.losses for window in schedule.windows] == [expected, expected]


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


@pytest.mark.skipif(BACKEND == "jax", reason="on JAX, `metrics` must show the compound loss")
def test_validation_of_a_model_whose_metrics_hide_the_record_is_apart_from_training():
    class Validates(Example):
        def test_step(self, x):
            return self.log(x, self.compute_loss(x, y_pred=self(x), training=False))

    schedule = LossWeightScheduler(NAMES, halve)
    check_still(fit_still(Validates(schedule), schedule, validation=3 * X))


@one_backend
def test_steps_without_a_use_are_no_batches_and_such_an_epoch_holds_the_weights(dwa):
    class Sometimes(ComputeLoss):
        uses = iter([False, True, False, False])

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            if next(self.uses):
                return super().compute_loss(x, y, y_pred)
            return ops.mean(y_pred["easy"])

    model = compiled(Sometimes(dwa), dwa, 0.0, run_eagerly=True)
    with pytest.warns(UserWarning, match="epoch 2 did not use its compound loss"):
        history = fit(model, dwa, batch_size=20, epochs=2)
    errors = model.predict(X, verbose=0)["easy"] - Y["easy"]
    np.testing.assert_allclose(history["easy_loss"][0], np.square(errors[20:]).mean(), rtol=1e-5)
    assert history["easy_weight"] == [1.0]


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


class Beside(keras.callbacks.Callback):
    """Keras calls its `on_train_batch_end` in parallel with the next steps."""

    async_safe = True

    def __init__(self, on_train_batch_end):
        super().__init__()
        self.call = on_train_batch_end

    def on_train_batch_end(self, batch, logs=None):
        self.call(batch)


def test_weight_is_read_in_another_thread_beside_the_steps(dwa):
    read = set()
    look = Beside(lambda batch: read.add(float(dwa.loss_weights["easy"])))
    history = train(dict_model(), dwa, batch_size=1, others=[look])
    check_run(history, dwa)
    assert {1.0, history["easy_weight"][-1]} <= read


# What a broken `fit` left to Keras's thread.
@one_backend
def test_late_end_of_a_batch_of_another_fit_changes_nothing():
    weighting = LossWeighting(list(LOSSES), update_freq=2)
    late = Lambda(
        on_train_batch_begin=lambda batch, logs: batch == 1 and weighting.on_train_batch_end(4)
    )
    fit(compiled(dict_model(), weighting), late, weighting, epochs=2)
    assert [window.batches for window in weighting.windows] == [2] * 5


@deep_elsewhere
def test_hooks_return_at_once_after_the_first_batches():
    def calls(batches):
        """The number of calls of the package's functions in an epoch of that many batches."""
        dwa, profile = DynamicWeightAverage(list(LOSSES)), cProfile.Profile()
        model = compiled(dict_model(), dwa)
        fit(model, dwa, epochs=1)
        profile.runcall(fit, model, dwa, epochs=1, batch_size=1, steps_per_epoch=batches)
        # Without the hooks themselves, and what an eager step reads and logs.
        others = ("on_train_batch_begin", "on_train_batch_end", "end_batch", "value", "result")
        return sum(
            entry.callcount
            for entry in profile.getstats()
            if "keras_dwa" in str(entry.code) and entry.code.co_name not in others
        )

    assert calls(30) == calls(20)
