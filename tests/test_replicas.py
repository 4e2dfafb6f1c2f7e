"""TensorFlow's replicas: two devices on one CPU, and two workers."""

import contextlib

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


def loop(rank, workers):
    """Trains in a custom loop; returns the weights after each epoch and the parameters.

    In epoch 2, one sample has a NaN.
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
    for epoch in range(5):
        offset = np.zeros(36, "float32")
        offset[7] = np.nan if epoch == 2 else 0.0
        data = X[:36], {name: target[:36] for name, target in Y.items()}, offset
        dataset = tf.data.Dataset.from_tensor_slices(data).batch(8)
        for batch in strategy.experimental_distribute_dataset(dataset):
            step(*batch)
        weights.append(list(dwa.step().values()))
    return {"weights": weights, "kernel": keras.ops.convert_to_numpy(model.trainable_variables[0])}


@pytest.mark.filterwarnings("ignore:DynamicWeightAverage holds")
def test_workers_have_the_weights_of_one_device_also_after_a_nan(tmp_path):
    expected = loop(0, 1)
    for found in (workers := ranks.run(loop, 2, tmp_path)):
        check_same(found, expected)
        assert found["weights"] == workers[0]["weights"]
    held = np.diff(expected["weights"], axis=0)[:, 0] == 0
    assert held.tolist() == [False, True, False, False]
