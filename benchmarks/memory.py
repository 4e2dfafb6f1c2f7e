"""What the callback keeps after 5, 50 and 500 epochs: the same after 500 as after 5.

    KERAS_BACKEND=jax python benchmarks/memory.py

Prints the bytes that lines of keras_dwa allocated and that are still in use after training; the
size of the pickled callback; and how much the memory of all of Python grew during training, with
DWA and with static weights, because Keras and its backend also keep something. Keras's `History`, a
list of all logs, is dropped first. All runs in one process, with a new model each time, after a
long training that fills caches.
"""

import gc
import os
import pickle
import tracemalloc
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from harness import parse, print_table

import keras_dwa

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = {"sum": X.sum(axis=1, keepdims=True), "mean": X.mean(axis=1, keepdims=True)}
OURS = tracemalloc.Filter(True, str(Path(keras_dwa.__file__).parent / "*"))


def allocated(snapshot):
    return sum(statistic.size for statistic in snapshot.statistics("filename"))


def train(epochs, dwa=None):
    """Returns the bytes that are ours, and how much Python grew in total."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, {name: keras.layers.Dense(1)(inputs) for name in Y})
    weights, callbacks = (dwa.loss_weights, [dwa]) if dwa else (dict.fromkeys(Y, 1.0), [])
    model.compile("sgd", dict.fromkeys(Y, "mse"), loss_weights=weights)
    model.fit(X, Y, epochs=3, verbose=0, callbacks=callbacks)  # Keeps the compiled step.
    gc.collect()
    before = tracemalloc.take_snapshot()
    model.fit(X, Y, epochs=epochs, verbose=0, callbacks=callbacks)
    model.history = None
    gc.collect()
    after = tracemalloc.take_snapshot()
    return allocated(after.filter_traces([OURS])), allocated(after) - allocated(before)


def main():
    is_quick = parse(__doc__).quick
    tracemalloc.start()
    train(10 if is_quick else 500, keras_dwa.DynamicWeightAverage(list(Y)))
    rows = []
    for epochs in (5,) if is_quick else (5, 50, 500):
        dwa = keras_dwa.DynamicWeightAverage(list(Y))
        ours, growth = train(epochs, dwa)
        _, static_growth = train(epochs)
        pickled = len(pickle.dumps(dwa))
        rows.append((keras.backend.backend(), epochs, ours, pickled, growth, static_growth))
    tracemalloc.stop()
    columns = ["backend", "epochs", "keras_dwa", "pickled", "all grew by", "with static weights"]
    print_table(columns, rows)


if __name__ == "__main__":
    main()
