"""How often the training step is traced while the weights move, and how long the steps take.

    KERAS_BACKEND=jax python benchmarks/traces.py

Each way trains its own model for 100 epochs of 10 batches: with static weights, with DWA once an
epoch, with DWA in windows of 1, 10 and 100 batches, and with a new `compile` before each epoch (for
3 epochs only, as the column says).

On TensorFlow and JAX, traces are the calls of the optimizer's `apply`, Python code that a compiled
step no longer runs once it is traced. On torch, where the models are compiled with
`jit_compile=True`, they are the graphs that `torch.compile` made (`unique_graphs`); the table also
has its graph breaks. There are many of both, also with static weights.

The time (not on torch) is that of a few more epochs, which are not counted. All ways except the
last train them in turn, in the same process. It is the ratio to static weights within a round:
median and quartiles.
"""

import functools
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from harness import interleaved, parse, print_table, ratios, shown

from keras_dwa import DynamicWeightAverage

BACKEND = keras.backend.backend()
NAMES = ["depth", "normals"]
LOSSES = dict.fromkeys(NAMES, "mse")
STATIC = dict.fromkeys(NAMES, 1.0)
BATCHES = 10

X = np.random.default_rng(0).normal(size=(BATCHES * 32, 32)).astype("float32")
Y = {name: X[:, [k]] ** (k + 1) for k, name in enumerate(NAMES)}


class CountingSGD(keras.optimizers.SGD):
    """Counts how often it is called in Python."""

    calls = 0

    def apply(self, grads, trainable_variables=None):
        CountingSGD.calls += 1
        return super().apply(grads, trainable_variables)


def counts():
    """Traces and graph breaks so far."""
    if BACKEND != "torch":
        return CountingSGD.calls, 0
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def build():
    if BACKEND == "torch":
        import torch

        torch._dynamo.reset()  # Otherwise it stops compiling a function after 8 times.
    inputs = keras.Input((32,))
    features = keras.layers.Dense(256, activation="relu")(inputs)
    return keras.Model(inputs, {name: keras.layers.Dense(1)(features) for name in NAMES})


def compile_model(model, loss_weights, is_quick):
    optimizer = keras.optimizers.SGD if BACKEND == "torch" else CountingSGD
    # On torch, compiling takes minutes.
    jit = {"jit_compile": not is_quick} if BACKEND == "torch" else {}
    model.compile(optimizer(1e-3), LOSSES, loss_weights=loss_weights, **jit)


def fit(model, epochs, callbacks=()):
    model.fit(X, Y, 32, epochs, verbose=0, callbacks=list(callbacks))


def trained(update_freq, epochs, is_quick):
    """Trains with DWA, or static weights if None; returns a function that trains more, to time."""
    model = build()
    dwa = update_freq and DynamicWeightAverage(NAMES, update_freq=update_freq)
    compile_model(model, dwa.loss_weights if dwa else STATIC, is_quick)
    callbacks = [dwa] if dwa else []
    fit(model, epochs, callbacks)
    return functools.partial(fit, model, callbacks=callbacks)


def trained_compiling_again(epochs, is_quick):
    model = build()
    for epoch in range(epochs):
        compile_model(model, {name: 1.0 + k * epoch for k, name in enumerate(NAMES)}, is_quick)
        fit(model, 1)


def measured(is_quick):
    """A row for each way."""
    epochs, again, rounds = (2, 2, 2) if is_quick else (100, 3, 15)
    ways = {"static": None, "DWA, each epoch": "epoch"}
    ways |= {f"DWA, windows of {n}": n for n in ((10,) if is_quick else (1, 10, 100))}
    runs, counted = {}, []
    for name, update_freq in ways.items():
        before = counts()
        runs[name] = functools.partial(trained(update_freq, epochs, is_quick), 1 if is_quick else 5)
        counted.append((name, epochs, *np.subtract(counts(), before)))
    before = counts()
    trained_compiling_again(again, is_quick)
    counted.append(("static, compiled again each epoch", again, *np.subtract(counts(), before)))

    # On torch, compiled functions of earlier models were reset.
    taken = {} if BACKEND == "torch" else interleaved(runs, rounds)
    for name, trained_for, traces, breaks in counted:
        breaks = breaks if BACKEND == "torch" else "-"
        time = shown(ratios(taken, name, "static")) if name in taken else "-"
        yield BACKEND, name, trained_for, trained_for * BATCHES, traces, breaks, time


def main():
    is_quick = parse(__doc__).quick
    columns = ["backend", "weights", "epochs", "batches", "traces", "graph breaks", "time / static"]
    print_table(columns, measured(is_quick))


if __name__ == "__main__":
    main()
