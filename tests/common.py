"""The smallest models and data that can show a claim, and the checks that every run must pass."""

import contextlib
import itertools

import keras
import numpy as np
import pytest

from keras_dwa import CompoundLoss

BACKEND = keras.backend.backend()

# For claims that do not depend on the backend: names, messages, arithmetic on the host. On JAX,
# because coverage is measured there.
one_backend = pytest.mark.skipif(BACKEND != "jax", reason="says nothing about a backend")


# For code that is the same on each backend: always runs on JAX, and elsewhere in `nox -s deep`.
deep_elsewhere = pytest.mark.skipif(False, reason="") if BACKEND == "jax" else pytest.mark.deep

SAMPLES = 40
X = np.random.default_rng(0).normal(size=(SAMPLES, 4)).astype("float32")
# The two targets differ in how fast they are learned, so that the weights move apart.
Y = {
    "easy": (X @ [[1.0], [-1.0], [0.5], [0.0]]).astype("float32"),
    "hard": np.random.default_rng(1).normal(size=(SAMPLES, 2)).astype("float32"),
}
LOSSES = {"easy": "mse", "hard": "mae"}
NAMES = list(LOSSES)
Lambda = keras.callbacks.LambdaCallback

MODES = {
    "default": {},
    "eager": {"run_eagerly": True},
    "jit": {"jit_compile": True},
    "steps_per_execution": {"steps_per_execution": 4},
}
# Ways of `compile` that change nothing on this backend, or that Keras refuses.
for same in {"jax": ["jit"], "torch": ["eager", "steps_per_execution"]}.get(BACKEND, []):
    del MODES[same]
COMPILED_AND_EAGER = [mode for mode in MODES if mode in ("default", "eager")]


@contextlib.contextmanager
def floatx(dtype):
    """Sets Keras's default dtype, and allows JAX to use it."""

    def allow_float64(allowed):
        if BACKEND == "jax":
            import jax

            jax.config.update("jax_enable_x64", allowed)

    keras.config.set_floatx(dtype)
    allow_float64(dtype == "float64")
    try:
        yield
    finally:
        keras.config.set_floatx("float32")
        allow_float64(False)


def heads(width=6, **trunk):
    """An input, and the outputs of two heads on one shared trunk."""
    inputs = keras.Input((4,))
    features = keras.layers.Dense(width, activation="tanh", **trunk)(inputs)
    outputs = {
        "easy": keras.layers.Dense(1, name="easy")(features),
        "hard": keras.layers.Dense(2, name="hard")(features),
    }
    return inputs, outputs


def dict_model(**trunk):
    return keras.Model(*heads(**trunk))


@keras.saving.register_keras_serializable("tests")
class TwoHeads(keras.Model):
    """A subclassed model with dict outputs."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.trunk = keras.layers.Dense(6, activation="tanh")
        self.easy = keras.layers.Dense(1)
        self.hard = keras.layers.Dense(2)

    def call(self, inputs):
        features = self.trunk(inputs)
        return {"easy": self.easy(features), "hard": self.hard(features)}


class ComputeLoss(TwoHeads):
    """A model whose `compute_loss` calls a compound loss."""

    def __init__(self, dwa, **kwargs):
        super().__init__(**kwargs)
        self.compound = CompoundLoss(LOSSES, dwa)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return self.compound(y, y_pred, sample_weight)


def compiled(model, weighting=None, rate=0.05, **arguments):
    """Compiles a model, with the weights unless it calls a compound loss; returns it."""
    if weighting and not isinstance(model, ComputeLoss):
        arguments = {"loss": LOSSES, "loss_weights": weighting.loss_weights, **arguments}
    model.compile(**{"optimizer": keras.optimizers.SGD(rate), **arguments})
    return model


def fit(model, *callbacks, x=X, y=Y, **arguments):
    """Fits three epochs of five batches in order; returns the history's dict."""
    batches = {} if y is None else {"batch_size": 8}
    arguments = {"epochs": 3, "shuffle": False, "verbose": 0, **batches, **arguments}
    return model.fit(x, y, callbacks=list(callbacks), **arguments).history


def train(model, dwa, *data, loss=LOSSES, optimizer=None, mode=None, others=(), **arguments):
    """Compiles and fits as a user would, with `others` as callbacks; returns the history's dict."""
    optimizer = optimizer or keras.optimizers.SGD(0.05)
    model.compile(optimizer, loss, loss_weights=dwa.loss_weights, **(mode or {}))
    arguments |= dict(zip("xy", data, strict=False))
    return fit(model, dwa, *others, **arguments)


def move(dwa):
    """Ends two epochs, so that the weights move; returns them."""
    dwa.step({"easy": 2.0, "hard": 4.0})
    return dwa.step({"easy": 1.0, "hard": 3.0})


def joined(*histories):
    """The history of several fits as one."""
    return {key: [value for h in histories for value in h[key]] for key in histories[0]}


def our_messages(warned):
    """The texts of our warnings among those that `pytest.warns` recorded."""
    messages = [str(warning.message) for warning in warned]
    return [message for message in messages if "DynamicWeightAverage" in message]


def expected_weights(history, dwa):
    """The weights of each epoch by the paper's formula, from the logged losses. (epochs, K)"""
    losses = np.array([history[f"{name}_loss"] for name in dwa.outputs], dtype="float64").T
    base = np.array(list(dwa.base_weights.values()))
    weights = [base, base]
    for before_previous, previous in itertools.pairwise(losses):
        exponentials = np.exp(previous / before_previous / dwa.temperature)
        weights.append(base * len(base) * exponentials / exponentials.sum())
    return np.array(weights[: len(losses)])


def check_base_loss(history, base_weights, added=0.0, rtol=1e-5):
    """`base_loss` is the sum of the logged losses under the base weights, and what is added."""
    for prefix in ("", "val_"):
        if f"{prefix}loss" in history:
            parts = [w * np.array(history[f"{prefix}{n}_loss"]) for n, w in base_weights.items()]
            np.testing.assert_allclose(history[f"{prefix}base_loss"], sum(parts) + added, rtol)


def check_run(history, dwa):
    """Logged losses are the weighted sums of logged parts; the weights follow the formula."""
    names = dwa.outputs
    weights = np.array([history[f"{name}_weight"] for name in names]).T
    for prefix in ("", "val_"):
        if f"{prefix}loss" in history:
            parts = np.array([history[f"{prefix}{name}_loss"] for name in names]).T
            # With `validation_freq`, the last epoch of each period is the validated one.
            had = weights[len(weights) // len(parts) - 1 :: len(weights) // len(parts)]
            np.testing.assert_allclose(history[f"{prefix}loss"], (had * parts).sum(1), rtol=1e-5)
    check_base_loss(history, dwa.base_weights)
    expected = expected_weights(history, dwa)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    if len(weights) > 2:
        # Otherwise a weight that never reaches the step would also pass.
        assert np.abs(weights[2:] / weights[0] - 1).max() > 1e-3
