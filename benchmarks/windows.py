"""What windows of N batches cost, and how large N must be for the losses to show through the noise.

    KERAS_BACKEND=jax python benchmarks/windows.py

First the time of `fit` against weights that move once an epoch: ratios within each round, median
of all. Then the digits of `examples/digits.py`: by how much the losses' averages differ from one
window to the next, in training, and then with a learning rate of 0, where all of it is noise.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import keras
import numpy as np
from digits import TASKS, build_model, split_digits

from keras_dwa import DynamicWeightAverage

SIZES = (1, 10, 100)


def seconds(model, dwa, data):
    start = time.perf_counter()
    model.fit(*data, batch_size=32, epochs=5, verbose=0, callbacks=[dwa])
    return time.perf_counter() - start


def print_times(data, rounds):
    models = {}
    for size in ("epoch", *SIZES):
        dwa = DynamicWeightAverage(list(TASKS), update_freq=size)
        model = build_model()
        model.compile(optimizer="adam", loss=TASKS, loss_weights=dwa.loss_weights)
        models[size] = model, dwa
        seconds(*models[size], data)
    ratios = {size: [] for size in SIZES}
    for _ in range(rounds):
        base = seconds(*models["epoch"], data)
        for size in SIZES:
            ratios[size].append(seconds(*models[size], data) / base)
    step = base / 5 / -(-len(data[0]) // 32) * 1e3
    print(f"Keras {keras.__version__} on {keras.backend.backend()}, {step:.2f} ms a step:")
    for size, values in ratios.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"N = {size:4}: median {statistics.median(values):.2f} ({spread}), {rounds} rounds")


def rate(windows):
    """The median relative difference of two windows in a row, over all outputs."""
    losses = np.array([list(window.losses.values()) for window in windows])
    return np.median(np.abs(losses[1:] / losses[:-1] - 1))


def print_noise(data, epochs):
    print("\n   N | in training | still | weights move by")
    for size in (1, 5, 11, 22, 44):
        keras.utils.set_random_seed(0)
        dwa = DynamicWeightAverage(list(TASKS), update_freq=size)
        model = build_model()
        model.compile("adam", TASKS, loss_weights=dwa.loss_weights)
        arguments = {"batch_size": 64, "epochs": epochs, "verbose": 0, "callbacks": [dwa]}
        model.fit(*data, **arguments)
        trained = dwa.windows
        model.optimizer.learning_rate = 0.0
        model.fit(*data, **arguments)
        still = dwa.windows[len(trained) :]
        weights = np.array([list(window.weights.values()) for window in trained])
        moved = np.abs(np.diff(weights, axis=0)).mean()
        print(f"{size:4} | {rate(trained):11.3f} | {rate(still):5.3f} | {moved:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=15)
    arguments = parser.parse_args()
    data, _ = split_digits()
    print_times(data, arguments.rounds)
    print_noise(data, arguments.epochs)


if __name__ == "__main__":
    main()
