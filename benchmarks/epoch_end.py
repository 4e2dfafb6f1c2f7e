"""The cost of the end of an epoch: the callback's `on_epoch_end`, for 2 to 1024 outputs.

    KERAS_BACKEND=jax python benchmarks/epoch_end.py

Prints milliseconds (median and quartiles over many epochs), for all of it and for the equation
alone, `dwa_weights`. The logs are made up and the model has no layers to train, so nothing else
runs.
"""

import os
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from harness import parse, print_table, shown
from models import names as names_of

from keras_dwa import DynamicWeightAverage, dwa_weights


def milliseconds(names, epochs):
    """The seconds of each epoch's end, and of the equation alone."""
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
    for epoch in range(epochs):
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
    # The first two epochs compute no weights.
    return ends[2:], equations[2:]


def main():
    is_quick = parse(__doc__).quick
    epochs, all_outputs = (5, (2, 32)) if is_quick else (60, (2, 8, 32, 128, 1024))
    rows = []
    for outputs in all_outputs:
        ends, equations = milliseconds(names_of(outputs), epochs)
        rows.append((keras.backend.backend(), outputs, shown(ends), shown(equations)))
    print_table(["backend", "K", "the end of an epoch, ms", "the equation in it, ms"], rows)


if __name__ == "__main__":
    main()
