"""TensorFlow's replicas: two devices on one CPU, and two workers."""

import contextlib
import os
import shutil
import signal

import keras
import numpy as np
import pytest
import ranks
from common import BACKEND, NAMES, ComputeLoss, X, Y, compiled, dict_model, fit
from ranks import check_same

from keras_dwa import CompoundLoss, DynamicWeightAverage

pytestmark = [
    pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute is TensorFlow's"),
    pytest.mark.deep,
]

if BACKEND == "tensorflow":
    import tensorflow as tf


def train(strategy, is_compound, made_in_scope=True, samples=36, rate=0.05, update_freq="epoch"):
    """Trains in the replicas of a strategy, None for none; returns the results."""
    keras.utils.set_random_seed(0)
    scope = strategy.scope if strategy else contextlib.nullcontext
    with scope() if made_in_scope else contextlib.nullcontext():
        dwa = DynamicWeightAverage(NAMES, temperature=0.2, update_freq=update_freq)
    with scope():
        model = compiled(ComputeLoss(dwa) if is_compound else dict_model(), dwa, rate)
    x, y = X[:samples], {name: target[:samples] for name, target in Y.items()}
    return {
        **fit(model, dwa, x=x, y=y, epochs=5),
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


@pytest.mark.parametrize(("is_compound", "made_in_scope"), [(False, True), (True, False)])
def test_logs_weights_and_windows_are_those_of_one_device(is_compound, made_in_scope):
    # The last batch of an epoch has 4 samples.
    found = train(two_replicas(), is_compound, made_in_scope, update_freq=3)
    check_same(found, train(None, is_compound, update_freq=3))
    assert len(found["windows"]) == 8
    assert not np.allclose(found["factors"], 1)


def test_average_is_that_of_the_samples_whatever_the_shares():
    # Of the last 5 samples, one replica has 3, the other 2. Nothing is learned.
    found = train(two_replicas(), True, samples=37, rate=0.0)
    check_same(found, train(None, True, samples=37, rate=0.0))


def loop(rank, workers, folder=None, nan_at=None, kill_at=None):
    """Trains in a custom loop; returns the weights after each epoch and the parameters.

    Continues from what this worker wrote into `folder`. In epoch `nan_at`, one sample has a NaN. At
    the epoch and batch `kill_at`, the first worker is killed.
    """
    several = tf.distribute.MultiWorkerMirroredStrategy() if workers > 1 else None
    strategy = several or tf.distribute.get_strategy()
    keras.utils.set_random_seed(0)
    with strategy.scope():
        dwa = DynamicWeightAverage(NAMES, temperature=0.2)
        model = dict_model()
        model.compound = CompoundLoss(NAMES, dwa)
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
