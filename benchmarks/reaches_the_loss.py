"""Which ways to change a loss weight between two epochs have an effect on the loss.

    KERAS_BACKEND=jax python benchmarks/reaches_the_loss.py

A model with two outputs trains on one batch per epoch, so that the logged `loss` is that of one
step. In the last epoch, it is compared with the sum of the logged parts times their *claimed*
weights: those in the dict, variable or callback that changed them. The table says "yes" if the two
are equal to 1e-4, "no" if the loss is the sum under the initial weights, 1 and 1, and the type of
an error. "default" is plain `compile`. On torch, that compiles nothing, so there is also a column
with `jit_compile=True` (but not with `--quick`).

`AdaptiveLossCallback` is from the package softadapt, used as its documentation says, without the
argument `weights`, which 0.2.0 documents but does not accept.
"""

import functools
import importlib.metadata
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from harness import parse, print_table

from keras_dwa import DynamicWeightAverage, LossWeighting

LOSSES = {"depth": "mse", "normals": "mse"}
START = {"depth": 1.0, "normals": 1.0}
CHANGED = {"depth": 0.5, "normals": 1.5}
EPOCHS = 6

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
# One is learned much faster, so the rules move the weights apart.
Y = {"depth": 3 * X[:, :1], "normals": np.random.default_rng(1).normal(size=(16, 2))}
MODES = {
    "default": {},
    "`run_eagerly=True`": {"run_eagerly": True},
    "`jit_compile=True`": {"jit_compile": True},
}


def train(loss_weights, claimed, mode, change=lambda: None, callbacks=(), model=None):
    """Trains, with `change` called once half of it is done; returns the model and what it shows.

    That is the last epoch's logs, and the weights that `claimed` returned in it.
    """
    if model is None:
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        model = keras.Model(
            inputs, {name: keras.layers.Dense(Y[name].shape[1], name=name)(inputs) for name in Y}
        )
    model.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=loss_weights, **mode)
    shown = []

    def on_epoch_begin(epoch, logs):
        if epoch == EPOCHS // 2:
            change()
        if epoch == EPOCHS - 1:
            shown.extend(float(keras.ops.convert_to_numpy(weight)) for weight in claimed(model))

    callbacks = [*callbacks, keras.callbacks.LambdaCallback(on_epoch_begin=on_epoch_begin)]
    logs = model.fit(X, Y, 16, EPOCHS, verbose=0, shuffle=False, callbacks=callbacks).history
    return model, {name: values[-1] for name, values in logs.items()}, shown


def compile_again(mode):
    model, _, _ = train(START, lambda model: START.values(), mode)
    return train(CHANGED, lambda model: CHANGED.values(), mode, model=model)


def floats(mode):
    weights = dict(START)
    return train(weights, lambda model: weights.values(), mode, lambda: weights.update(CHANGED))


def variables(mode):
    weights = {name: keras.Variable(START[name], trainable=False) for name in START}

    def change():
        for name, weight in weights.items():
            weight.assign(CHANGED[name])

    return train(weights, lambda model: weights.values(), mode, change)


def soft_adapt(mode):
    from softadapt.callbacks import AdaptiveLossCallback

    callback = AdaptiveLossCallback(
        components=list(LOSSES), frequency="epoch", beta=0.1, algorithm="base", clip_weights=True
    )
    return train(START, lambda model: callback.weights, mode, callbacks=[callback])


def assign(mode):
    weighting = LossWeighting(START)
    weights = weighting.loss_weights
    change = functools.partial(weighting.assign, CHANGED)
    return train(weights, lambda model: weights.values(), mode, change, [weighting])


def dynamic_weight_average(mode):
    dwa = DynamicWeightAverage(START, temperature=0.2)
    weights = dwa.loss_weights
    return train(weights, lambda model: weights.values(), mode, callbacks=[dwa])


def version():
    try:
        return importlib.metadata.version("softadapt")
    except importlib.metadata.PackageNotFoundError:
        return ""


WAYS = {
    "numbers, compiled again": compile_again,
    "numbers, changed in the dict": floats,
    "`keras.Variable`, assigned": variables,
    f"softadapt {version()}".strip() + ", `AdaptiveLossCallback`": soft_adapt,
    "keras_dwa, `LossWeighting.assign`": assign,
    "keras_dwa, `DynamicWeightAverage`": dynamic_weight_average,
}


def row(way, mode):
    """The claimed weights, how far their sum is from the loss, and whether they reach it."""
    if "jit" in mode:
        import torch

        torch._dynamo.reset()  # Otherwise it stops compiling after 8 models.
    try:
        _, logs, claimed = WAYS[way](MODES[mode])
    except ImportError:
        return "-", "-", "not installed"
    except Exception as error:
        if way.startswith("keras_dwa"):
            raise
        return "-", "-", type(error).__name__
    parts = [logs[f"{name}_loss"] for name in LOSSES]
    under_claimed, under_start = np.dot(claimed, parts), np.dot(list(START.values()), parts)
    assert abs(under_claimed / under_start - 1) > 0.01, "the weights hardly moved"
    far = abs(logs["loss"] / under_claimed - 1)
    if far < 1e-4:
        reached = "yes"
    else:
        reached = "no" if abs(logs["loss"] / under_start - 1) < 1e-4 else "neither"
    return ", ".join(f"{weight:.3f}" for weight in claimed), f"{far:.1e}", reached


def main():
    is_quick = parse(__doc__).quick
    backend = keras.backend.backend()
    modes = [mode for mode in MODES if "jit" not in mode or (backend == "torch" and not is_quick)]
    print_table(
        ["backend", "mode", "weights", "claimed", "relative difference", "reaches the loss"],
        [(backend, mode, way, *row(way, mode)) for mode in modes for way in WAYS],
    )


if __name__ == "__main__":
    main()
