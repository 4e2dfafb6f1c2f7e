"""Losses that would poison a ratio, in real training: the weights stay sane, and recover."""

import keras
import numpy as np
import pytest
from common import (
    X,
    Y,
    check_run,
    dict_model,
    expected_weights,
    floatx,
    heads,
    joined,
    our_messages,
    train,
)

from keras_dwa import DynamicWeightAverage


@pytest.fixture
def dwa():
    return DynamicWeightAverage({"easy": 3.0, "hard": 0.5}, temperature=0.2)


class Epochs(keras.utils.PyDataset):
    """Batches that differ by epoch: `targets` and `batches` tell what the given epoch has."""

    def __init__(self, targets=None, batches=None):
        super().__init__()
        self.targets, self.batches, self.epoch = targets or {}, batches or {}, 0
        # Keras calls `PyDataset.on_epoch_end` before the first epoch, too.
        self.counter = keras.callbacks.LambdaCallback(on_epoch_begin=self._begin)

    def _begin(self, epoch, logs):
        self.epoch = epoch

    def __len__(self):
        return self.batches.get(self.epoch, 5)

    def __getitem__(self, index):
        batch = slice(index * 8, index * 8 + 8)
        targets = {**Y, **self.targets.get(self.epoch, {})}
        return X[batch], {name: target[batch] for name, target in targets.items()}


def check_sane(history, dwa):
    """Finite weights, never negative, with the right sum; `loss` is the sum of its parts."""
    base = np.array(list(dwa.outputs.values()))
    weights = np.array([history[f"{name}_weight"] for name in dwa.outputs]).T
    parts = np.array([history[f"{name}_loss"] for name in dwa.outputs]).T
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    tolerance = 1e-2 if keras.config.floatx() == "float16" else 1e-5
    np.testing.assert_allclose((weights / base).sum(axis=1), len(base), rtol=tolerance)
    finite = np.isfinite(parts).all(axis=1)
    totals = (weights * parts).sum(axis=1)
    np.testing.assert_allclose(np.array(history["loss"])[finite], totals[finite], rtol=tolerance)


def without_epoch(history, epoch):
    return {key: values[:epoch] + values[epoch + 1 :] for key, values in history.items()}


def fit_and_warn(dwa, data, optimizer, mode):
    """Six epochs of batches in their order; the history, and our only warning."""
    fit = {"epochs": 6, "shuffle": False, "others": [data.counter]}
    with pytest.warns(UserWarning, match="DynamicWeightAverage") as warned:
        history = train(dict_model(), dwa, data, None, optimizer=optimizer, mode=mode, **fit)
    (message,) = our_messages(warned)
    return history, message


def test_labels_that_are_nan_for_an_epoch_leave_it_out(dwa, mode):
    data = Epochs(targets={2: {"easy": np.full_like(Y["easy"], np.nan)}})
    # Which skips a step whose gradient is not finite; others would keep NaN in the parameters.
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), initial_scale=1.0)
    history, message = fit_and_warn(dwa, data, optimizer, mode)
    assert "after 3 epochs: the loss of 'easy' (nan) is not finite" in message
    check_sane(history, dwa)
    assert np.isnan(history["easy_loss"][2])
    assert np.isfinite(without_epoch(history, 2)["loss"]).all()
    # As if the epoch had not been.
    assert history["easy_weight"][3] == history["easy_weight"][2] != 3.0
    check_run(without_epoch(history, 2), dwa)


def test_loss_that_overflows_float16_leaves_the_epoch_out(mode):
    # The square of 1000 is beyond float16. Keras scales the losses of this optimizer.
    data = Epochs(targets={2: {"easy": np.full_like(Y["easy"], 1000)}})
    with floatx("float16"):
        dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.5)
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05))
        history, message = fit_and_warn(dwa, data, optimizer, mode)
        assert "after 3 epochs: the loss of 'easy' (inf) is not finite" in message
        check_sane(history, dwa)
    finite = without_epoch(history, 2)
    assert np.isfinite(finite["loss"]).all()
    weights = np.array([finite["easy_weight"], finite["hard_weight"]]).T
    np.testing.assert_allclose(weights, expected_weights(finite, dwa, 0.5), rtol=5e-3)
    assert abs(weights[3, 0] - 1) > 0.01


def margin_model():
    """Its hinge loss on the sign of an input is 0 once the weight of that input is large."""
    inputs, outputs = heads()
    margin = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")(inputs[:, :1])
    return keras.Model(inputs, {"easy": margin, "hard": outputs["hard"]})


SIGNS = np.where(X[:, :1] > 0, 1.0, -1.0).astype("float32")
# So that the margin is reached by a few steps.
SIGNED_X = np.concatenate([4 * SIGNS, X[:, 1:]], axis=1)
MARGIN = {"easy": "hinge", "hard": "mae"}


def test_loss_that_reaches_zero_lets_the_others_go_on(dwa, mode):
    targets = {"easy": SIGNS, "hard": Y["hard"]}
    history = train(margin_model(), dwa, SIGNED_X, targets, loss=MARGIN, epochs=6, mode=mode)
    check_sane(history, dwa)
    assert history["easy_loss"][0] > 0
    assert history["easy_loss"][1:] == [0.0] * 5
    hard = np.array(history["hard_loss"])
    # Rate 0 in the third epoch, for the loss fell to 0; from then on it is done: rate 1.
    for epoch, rate in [(2, 0.0), (3, 1.0), (5, 1.0)]:
        exponentials = np.exp(np.array([rate, hard[epoch - 1] / hard[epoch - 2]]) / 0.2)
        expected = 3.0 * 2 * exponentials[0] / exponentials.sum()
        np.testing.assert_allclose(history["easy_weight"][epoch], expected, rtol=1e-5)


def test_loss_that_rises_from_zero_holds_the_weights_for_an_epoch(dwa, mode):
    model = margin_model()
    targets = {"easy": SIGNS, "hard": Y["hard"]}
    first = train(model, dwa, SIGNED_X, targets, loss=MARGIN, mode=mode)
    flipped = {**targets, "easy": -SIGNS}
    fit = {"batch_size": 8, "epochs": 4, "verbose": 0, "callbacks": [dwa]}
    model.optimizer.learning_rate = 1e-3
    with pytest.warns(UserWarning, match="DynamicWeightAverage") as warned:
        second = model.fit(SIGNED_X, flipped, **fit).history
    (message,) = our_messages(warned)
    assert f"after 1 epochs: the loss of 'easy' ({second['easy_loss'][0]}) rose from 0" in message
    check_sane(joined(first, second), dwa)
    assert second["easy_weight"][1] == second["easy_weight"][0]
    expected = expected_weights(second, dwa, 0.2)
    np.testing.assert_allclose(second["easy_weight"][2:], expected[2:, 0], rtol=1e-5)


def test_loss_that_is_always_zero_has_rate_one(dwa, mode):
    inputs, outputs = heads()
    nothing = keras.layers.Dense(1, kernel_initializer="zeros", name="easy")(inputs)
    model = keras.Model(inputs, {"easy": nothing, "hard": outputs["hard"]})
    targets = {"easy": np.zeros_like(Y["easy"]), "hard": Y["hard"]}
    history = train(model, dwa, y=targets, epochs=4, mode=mode)
    check_sane(history, dwa)
    assert history["easy_loss"] == [0.0] * 4
    hard = np.array(history["hard_loss"])
    exponentials = np.exp(np.array([np.ones(2), hard[1:3] / hard[:2]]) / 0.2)
    expected = 3.0 * 2 * exponentials[0] / exponentials.sum(axis=0)
    np.testing.assert_allclose(history["easy_weight"][2:], expected, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_epoch_without_batches_holds_the_weights(dwa, mode):
    data, weights, logs = Epochs(batches={2: 0}), [], []
    keep = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, log: weights.append(dwa.step()["easy"]),
        on_epoch_end=lambda epoch, log: logs.append({key: [log[key]] for key in log}),
    )
    fit = {"epochs": 6, "shuffle": False, "others": [data.counter, keep]}
    with pytest.warns(UserWarning, match="DynamicWeightAverage") as warned:
        train(dict_model(), dwa, data, None, mode=mode, **fit)
    (message,) = our_messages(warned)
    assert message.startswith("DynamicWeightAverage holds the loss weights: epoch 3 had no batch. ")
    assert weights[3] == weights[2] != 3.0
    # What Keras logs of such an epoch differs by backend.
    assert "easy_weight" not in logs.pop(2)
    check_run(joined(*logs), dwa)


def test_epoch_ended_early_counts_with_its_batches(dwa, mode):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                self.model.stop_training = True

    model = dict_model()
    first = train(model, dwa, mode=mode, epochs=2)
    fit = {"batch_size": 8, "verbose": 0, "epochs": 3}
    stopped = model.fit(X, Y, callbacks=[dwa, Stop()], **fit).history
    assert len(stopped["loss"]) == 1
    last = model.fit(X, Y, callbacks=[dwa], **fit).history
    check_run(joined(first, stopped, last), dwa)
