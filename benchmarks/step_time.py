"""What moving weights cost: epochs with DWA against static weights, and against recompiling.

    KERAS_BACKEND=jax python benchmarks/step_time.py

Each round trains the three ways in turn, in the same process; the ratios are taken within a round,
and the median of all rounds is printed. One process has one backend, so run it once for each.
"""

import os
import statistics
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

from keras_dwa import DynamicWeightAverage

ROUNDS, EPOCHS = 9, 10
NAMES = [f"task_{k}" for k in range(8)]
LOSSES = dict.fromkeys(NAMES, "mse")

X = np.random.default_rng(0).normal(size=(2048, 32)).astype("float32")
Y = {name: X[:, [k]] for k, name in enumerate(NAMES)}


def build(loss_weights):
    inputs = keras.Input((32,))
    features = keras.layers.Dense(256, activation="relu")(inputs)
    model = keras.Model(inputs, {name: keras.layers.Dense(1)(features) for name in NAMES})
    model.compile(keras.optimizers.SGD(1e-3), LOSSES, loss_weights=loss_weights)
    return model


def seconds(model, callbacks=(), epochs=EPOCHS):
    start = time.perf_counter()
    model.fit(X, Y, batch_size=32, epochs=epochs, verbose=0, callbacks=list(callbacks))
    return time.perf_counter() - start


def seconds_recompiling(model):
    start = time.perf_counter()
    for epoch in range(EPOCHS):
        weights = dict.fromkeys(NAMES, 1.0 + epoch / EPOCHS)
        model.compile(model.optimizer, LOSSES, loss_weights=weights)
        seconds(model, epochs=1)
    return time.perf_counter() - start


def main():
    dwa = DynamicWeightAverage(NAMES)
    static, moving = build(dict.fromkeys(NAMES, 1.0)), build(dwa.loss_weights)
    recompiled = build(dict.fromkeys(NAMES, 1.0))
    for model, callbacks in ((static, ()), (moving, [dwa]), (recompiled, ())):
        seconds(model, callbacks, epochs=2)

    ratios = {"DWA / static": [], "recompiling / static": []}
    for _ in range(ROUNDS):
        base = seconds(static)
        ratios["DWA / static"].append(seconds(moving, [dwa]) / base)
        ratios["recompiling / static"].append(seconds_recompiling(recompiled) / base)

    print(f"Keras {keras.__version__} on {keras.backend.backend()}, {len(NAMES)} outputs,")
    print(f"{EPOCHS} epochs of {len(X) // 32} steps, {ROUNDS} rounds:")
    for name, values in ratios.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name:22} median {statistics.median(values):.2f} ({spread})")


if __name__ == "__main__":
    main()
