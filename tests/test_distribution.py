"""Training under Keras's and TensorFlow's distribution, here of two devices on one CPU."""

import contextlib

import keras
import numpy as np
import pytest
from common import BACKEND, LOSSES, X, Y, check_run, dict_model, train

from keras_dwa import CompoundLoss, DynamicWeightAverage


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is for JAX")
def test_data_parallel():
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
        history = train(dict_model(), dwa, validation_split=0.2)
    finally:
        keras.distribution.set_distribution(None)
    check_run(history, dwa)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute is for TensorFlow")
@pytest.mark.parametrize("made_in_scope", [True, False])
def test_mirrored_strategy(made_in_scope):
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope() if made_in_scope else contextlib.nullcontext():
        dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
    with strategy.scope():
        model = dict_model()
        model.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=dwa.loss_weights)
    history = model.fit(X, Y, batch_size=8, epochs=4, verbose=0, callbacks=[dwa]).history
    check_run(history, dwa)


@pytest.mark.skipif(BACKEND != "jax", reason="sharded arrays are JAX's")
def test_stateless_call_on_sharded_batches():
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    dwa = DynamicWeightAverage(["easy", "hard"])
    compound = CompoundLoss(LOSSES, dwa)
    y_pred = {name: target + 2 for name, target in Y.items()}
    sharding = NamedSharding(jax.make_mesh((2,), ("batch",)), PartitionSpec("batch"))
    y, y_pred = jax.device_put((Y, y_pred), sharding)
    loss, variables = jax.jit(compound.stateless_call)(
        [variable.value for variable in dwa.variables], y, y_pred
    )
    np.testing.assert_allclose(loss, 4 + 2, rtol=1e-6)
    np.testing.assert_allclose(variables[-1], [160, 80, 40, 4, 2, 1], rtol=1e-6)
