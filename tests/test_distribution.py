"""Training under Keras's and TensorFlow's distribution, here of one device."""

import contextlib

import keras
import pytest
from common import BACKEND, LOSSES, X, Y, check_run, dict_model, train

from keras_dwa import DynamicWeightAverage


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is for JAX")
def test_data_parallel():
    devices = keras.distribution.list_devices()[:1]
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

    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope() if made_in_scope else contextlib.nullcontext():
        dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
    with strategy.scope():
        model = dict_model()
        model.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=dwa.loss_weights)
    history = model.fit(X, Y, batch_size=8, epochs=4, verbose=0, callbacks=[dwa]).history
    check_run(history, dwa)
