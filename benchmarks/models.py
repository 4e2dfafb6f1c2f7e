"""The models that the benchmarks train: a trunk of dense layers, and K outputs that regress."""

import keras
import numpy as np

import keras_dwa

# Width and number of the layers of the trunk, and samples of a batch.
SIZES = {"small": (64, 1, 32), "medium": (512, 3, 256)}


def names(outputs):
    return [f"output_{k}" for k in range(outputs)]


def data(outputs, samples):
    x = np.random.default_rng(0).normal(size=(samples, 32)).astype("float32")
    return x, {name: x[:, [k % 32]] for k, name in enumerate(names(outputs))}


def build(outputs, moving, size="small", **compile_arguments):
    """A compiled model, and the callbacks that train it: none for static weights."""
    width, depth, _ = SIZES[size]
    inputs = features = keras.Input((32,))
    for _ in range(depth):
        features = keras.layers.Dense(width, activation="relu")(features)
    heads = {name: keras.layers.Dense(1, name=name)(features) for name in names(outputs)}
    model, callbacks = keras.Model(inputs, heads), []
    loss_weights = dict.fromkeys(heads, 1.0)
    if moving:
        callbacks = [keras_dwa.DynamicWeightAverage(list(heads))]
        loss_weights = callbacks[0].loss_weights
    losses = dict.fromkeys(heads, "mse")
    model.compile(keras.optimizers.SGD(1e-3), losses, loss_weights, **compile_arguments)
    return model, callbacks
