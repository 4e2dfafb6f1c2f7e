"""TensorFlow's replicas: two devices on one CPU, and two workers."""

import contextlib
import os
import shutil
import signal

import keras
import numpy as np
import pytest
import ranks
from common import BACKEND, LOSSES, ComputeLoss, X, Y, check_run, dict_model
from ranks import check_same

from keras_dwa import CompoundLoss, DynamicWeightAverage

pytestmark = [
    pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute is TensorFlow's"),
    pytest.mark.deep,
]

if BACKEND == "tensorflow":
    import tensorflow as tf


class OwnStep(ComputeLoss):
    """Logs only the total, so that the recorded losses go into the logs."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"total": loss}


def fit(strategy, how, made_in_scope=True, samples=36, rate=0.05, update_freq="epoch"):
    """Trains in the replicas of a strategy, None for none; `how` is "compile" or a class."""
    keras.utils.set_random_seed(0)
    scope = strategy.scope if strategy else contextlib.nullcontext
    with scope() if made_in_scope else contextlib.nullcontext():
        dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2, update_freq=update_freq)
    with scope():
        model = dict_model() if how == "compile" else how(dwa)
        weighted = {"loss": LOSSES, "loss_weights": dwa.loss_weights} if how == "compile" else {}
        model.compile(keras.optimizers.SGD(rate), **weighted)
    x, y = X[:samples], {name: target[:samples] for name, target in Y.items()}
    history = model.fit(x, y, 8, 5, 0, callbacks=[dwa], shuffle=False).history
    return {
        **history,
        "factors": list(dwa.factors.values()),
        "windows": [list(window.weights.values()) for window in dwa.windows],
        "evaluated": model.evaluate(x, y, batch_size=8, verbose=0),
    }


def two_replicas():
    class Mirrored(tf.distribute.MirroredStrategy):
        # Or TensorFlow takes this for the strategy of another model in the same process, such as
        # that of the manual, and finds the gradients to have another shape.
        _collective_key_base = 1000

    return Mirrored(["CPU:0", "CPU:1"])


@pytest.mark.parametrize(("how", "made_in_scope"), [("compile", True), (ComputeLoss, False)])
def test_logs_and_weights_are_those_of_one_device(how, made_in_scope):
    # The sum of the parts is the total where all batches are of one size.
    found = fit(two_replicas(), how, made_in_scope, samples=40)
    check_run(found, DynamicWeightAverage(["easy", "hard"], temperature=0.2))
    check_same(found, fit(None, how, samples=40))


@pytest.mark.parametrize("how", ["compile", OwnStep])
def test_windows_are_those_of_one_device(how):
    # The last batch of an epoch has 4 samples.
    found, expected = (fit(devices, how, update_freq=3) for devices in (two_replicas(), None))
    expected.pop("total", None)  # With replicas, it is the total of only one.
    check_same(found, expected)
    assert len(found["windows"]) == 8


def test_average_is_that_of_the_samples_whatever_the_shares():
    # Of the last 5 samples, one replica has 3, the other 2. Nothing is learned.
    found = fit(two_replicas(), ComputeLoss, samples=37, rate=0.0)
    check_same(found, fit(None, ComputeLoss, samples=37, rate=0.0))


def loop(rank, workers, folder=None, nan_at=None, kill_at=None):
    """Trains in a custom loop; returns the weights after each epoch and the parameters.

    Continues from what this worker wrote into `folder`. In epoch `nan_at`, one sample has a NaN. At
    the epoch and batch `kill_at`, the first worker is killed.
    """
    several = tf.distribute.MultiWorkerMirroredStrategy() if workers > 1 else None
    strategy = several or tf.distribute.get_strategy()
    keras.utils.set_random_seed(0)
    with strategy.scope():
        dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
        model = dict_model()
        model.compound = CompoundLoss(["easy", "hard"], dwa)
        optimizer = keras.optimizers.SGD(0.05)
        optimizer.build(model.trainable_variables)
    files = sorted(folder.glob(f"*-{rank}.weights.h5")) if folder else []
    if files:
        model.load_weights(files[-1])

    def step_in_replica(x, y, offset):
        with tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            losses = {
                "easy": keras.losses.MeanSquaredError()(y["easy"], y_pred["easy"]),
                # Without a gradient, so a NaN spoils only the average.
                "hard": keras.losses.MeanAbsoluteError()(y["hard"], y_pred["hard"])
                + keras.ops.mean(offset),
            }
            loss = model.compound.combine(losses, samples=keras.ops.shape(x)[0])
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    @tf.function
    def step(*batch):
        strategy.run(step_in_replica, args=batch)

    weights = []
    for epoch in range(len(files), 5):
        offset = np.where(np.arange(36) == 7, np.nan if epoch == nan_at else 0.0, 0.0)
        data = X[:36], {name: target[:36] for name, target in Y.items()}, offset.astype("float32")
        dataset = tf.data.Dataset.from_tensor_slices(data).batch(8)
        for number, batch in enumerate(strategy.experimental_distribute_dataset(dataset)):
            if (epoch, number) == kill_at and rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            step(*batch)
        weights.append(list(dwa.step().values()))
        if folder:
            model.save_weights(folder / f"{epoch}-{rank}.weights.h5")
    return {"weights": weights, "kernel": keras.ops.convert_to_numpy(model.trainable_variables[0])}


@pytest.mark.filterwarnings("ignore:DynamicWeightAverage holds")
def test_workers_have_the_weights_of_one_device_also_after_a_nan(tmp_path):
    expected = loop(0, 1, None, 2)
    for found in (workers := ranks.run(loop, 2, tmp_path, None, 2)):
        check_same(found, expected)
        assert found["weights"] == workers[0]["weights"]
    held = np.diff(expected["weights"], axis=0)[:, 0] == 0
    assert held.tolist() == [False, True, False, False]


def test_killed_run_resumes_on_as_many_workers_and_on_one(tmp_path):
    whole = ranks.run(loop, 2, tmp_path / "whole")
    folder = tmp_path / "killed"
    killed = ranks.start(loop, 2, folder, folder, None, (3, 2))
    # In the other process, TensorFlow reports that its collective operations were aborted.
    assert ranks.exit_codes(killed) == [-signal.SIGKILL, 1]
    one = shutil.copytree(folder, tmp_path / "one")
    expected = {"weights": whole[0]["weights"][3:], "kernel": whole[0]["kernel"]}
    for found in ranks.run(loop, 2, folder, folder):
        check_same(found, expected, rtol=0)
    check_same(loop(0, 1, one), expected)


def fit_in_workers(rank, workers):
    try:
        fit(tf.distribute.MultiWorkerMirroredStrategy(), "compile")
    except ValueError as error:
        return str(error)


def test_keras_does_not_fit_with_several_workers(tmp_path):
    """The limit that the manual states, until a release of Keras lifts it."""
    for message in ranks.run(fit_in_workers, 2, tmp_path):
        assert message.startswith("Attempt to convert a value (PerReplica:")
