"""What the end of an epoch costs: the callback's `on_epoch_end`, for 2 to 1024 outputs.

    KERAS_BACKEND=jax python benchmarks/epoch_end.py

Printed is the median of many epochs in milliseconds, with the spread, and its share that is the
equation, `dwa_weights`. The logs are made up and the model has no layers to train, so that nothing
else runs. One process has one backend, so run it once for each.
"""

import os
import statistics
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

from keras_dwa import DynamicWeightAverage, dwa_weights

EPOCHS = 50


def milliseconds(names):
    """Of each epoch's end, and of the equation alone."""
    inputs = keras.Input((1,))
    model = keras.Model(inputs, {name: keras.layers.Identity()(inputs) for name in names})
    dwa = DynamicWeightAverage(names)
    losses = dict.fromkeys(names, "mse")
    model.compile("sgd", losses, loss_weights=dwa.loss_weights, run_eagerly=True)
    model.evaluate(np.zeros((1, 1)), {name: np.zeros((1, 1)) for name in names}, verbose=0)
    dwa.set_params({})
    dwa.set_model(model)
    dwa.on_train_begin()
    random, ends, equations = np.random.default_rng(0), [], []
    previous = random.uniform(0.1, 3, len(names))
    for epoch in range(EPOCHS):
        averages = random.uniform(0.1, 3, len(names))
        weights = [float(weight) for weight in dwa.loss_weights.values()]
        logs = {f"{name}_loss": loss for name, loss in zip(names, averages.tolist(), strict=True)}
        logs["loss"] = float(np.dot(weights, averages))
        dwa.on_epoch_begin(epoch)
        dwa.on_train_batch_end(0)
        start = time.perf_counter()
        dwa.on_epoch_end(epoch, logs)
        ends.append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        dwa_weights(averages, previous)
        equations.append(1e3 * (time.perf_counter() - start))
        previous = averages
    return ends[5:], equations[5:]


def main():
    print(f"Keras {keras.__version__} on {keras.backend.backend()}, {EPOCHS} epochs, in ms:")
    for count in (2, 32, 1024):
        ends, equations = milliseconds([f"output_{k}" for k in range(count)])
        print(
            f"{count:5} outputs: median {statistics.median(ends):.2f} ({min(ends):.2f} to "
            f"{max(ends):.2f}), of which the equation {statistics.median(equations):.2f}"
        )


if __name__ == "__main__":
    main()
