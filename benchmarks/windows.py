"""How large windows of N batches must be for the losses to stand out from the noise.

    KERAS_BACKEND=jax python benchmarks/windows.py

Shows how much the average losses of the digits of `examples/digits.py` differ from one window to
the next, in training, and then with a learning rate of 0, where all differences are noise.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import keras
import numpy as np
from digits import TASKS, build_model, split_digits
from harness import parse, print_table

from keras_dwa import DynamicWeightAverage


def rate(windows):
    """The median relative difference of consecutive windows, over all outputs."""
    losses = np.array([list(window.losses.values()) for window in windows])
    return np.median(np.abs(losses[1:] / losses[:-1] - 1))


def row(data, size, epochs):
    """The results for windows of `size` batches."""
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
    cells = f"{100 * rate(trained):.1f} %", f"{100 * rate(still):.1f} %", f"{moved:.3f}"
    return keras.backend.backend(), size, *cells


def main():
    is_quick = parse(__doc__).quick
    data, _ = split_digits()
    epochs, sizes = (1, (5,)) if is_quick else (15, (1, 5, 11, 22, 44))
    columns = ["backend", "N", "difference in training", "standing still", "weights move by"]
    print_table(columns, [row(data, size, epochs) for size in sizes])


if __name__ == "__main__":
    main()
