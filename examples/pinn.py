"""A physics-informed network that finds a damped oscillation only if weighted.

    python examples/pinn.py

You will see a network with equal loss weights settle on zero, a solution of the
equation but not of the problem, and one whose weights `adapt` scaled find the
oscillation. Takes half a minute on two CPU cores. The last line compares the
errors against the exact solution; pinn.png shows both networks (needs
matplotlib).

The equation is u'' + 2 d u' + (d^2 + w^2) u = 0 on [0, 1], from u(0) = 1 and
u'(0) = -d. The loss has two terms, the residual of the equation and the error
at the start, and the residual is hundreds of times larger. Its derivatives come
from the backend: the one that KERAS_BACKEND names, tensorflow, jax (if it is
unset) or torch.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras import ops

from keras_dwa import CompoundLoss, LossWeighting

DAMPING, FREQUENCY = 2.0, 8.0
TERMS = ["residual", "start"]


def derivatives_jax(u, x):
    """u(x), u'(x) and u''(x) for a batch of points x, shape (N, 1)."""
    import jax

    ones = jax.numpy.ones_like(x)

    def value_and_slope(x):
        return jax.jvp(u, (x,), (ones,))

    (value, slope), (_, curvature) = jax.jvp(value_and_slope, (x,), (ones,))
    return value, slope, curvature


def derivatives_tensorflow(u, x):
    import tensorflow as tf

    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            value = u(x)
        slope = inner.gradient(value, x)
    return value, slope, outer.gradient(slope, x)


def derivatives_torch(u, x):
    import torch

    # Keras evaluates under `torch.no_grad`, and so does `adapt`.
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = u(x)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return value, slope, curvature


derivatives = {
    "jax": derivatives_jax,
    "tensorflow": derivatives_tensorflow,
    "torch": derivatives_torch,
}[keras.backend.backend()]


class Oscillator(keras.Model):
    """A network u(x), trained by the equation alone, without targets."""

    def __init__(self, weighting):
        super().__init__()
        # Steep waves all over [0, 1].
        self.first = keras.layers.Dense(
            32,
            "tanh",
            kernel_initializer=keras.initializers.RandomNormal(0, 5),
            bias_initializer=keras.initializers.RandomNormal(0, 5),
        )
        self.second = keras.layers.Dense(32, "tanh")
        self.last = keras.layers.Dense(1)
        self.compound = CompoundLoss(TERMS, weighting)

    def call(self, x):
        return self.last(self.second(self.first(x)))

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        value, slope, curvature = derivatives(self, x)
        stiffness = DAMPING**2 + FREQUENCY**2
        residual = curvature + 2 * DAMPING * slope + stiffness * value
        value, slope, _ = derivatives(self, ops.zeros((1, 1)))
        start = ops.square(value - 1) + ops.square(slope + DAMPING)
        return self.compound.combine(
            {
                "residual": ops.mean(ops.square(residual)),
                "start": ops.sum(start),
            }
        )


def exact(x):
    return np.exp(-DAMPING * x) * np.cos(FREQUENCY * x)


def train(adapts, epochs, callbacks):
    """The trained network and its history; the start is the same for both."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).uniform(size=(2048, 1)).astype("float32")
    weighting = LossWeighting(TERMS)
    network = Oscillator(weighting)
    rate = keras.optimizers.schedules.CosineDecay(1e-2, 32 * epochs)
    network.compile(optimizer=keras.optimizers.Adam(rate))
    if adapts:
        weighting.adapt(network, x, batch_size=64)
    history = network.fit(
        x,
        epochs=epochs,
        batch_size=64,
        verbose=0,
        callbacks=[weighting, *callbacks],
    )
    return network, history.history


def save_picture(path, x, found):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No picture: it needs matplotlib.")
        return
    figure = Figure((9, 3.2), layout="constrained")
    solution, error = figure.subplots(1, 2)
    solution.plot(x, exact(x), color="0.7", linewidth=5, label="exact")
    for (name, u), color in zip(
        found.items(), ("#D55E00", "#0072B2"), strict=True
    ):
        solution.plot(x, u, color=color, label=name)
        error.semilogy(x, np.abs(u - exact(x)), color=color, label=name)
    solution.set(title="solution u(x)", xlabel="x")
    error.set(title="error", xlabel="x")
    solution.legend(frameon=False)
    figure.savefig(path, dpi=110)
    print(f"Picture: {os.path.abspath(path)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--picture", default="pinn.png", metavar="FILE")
    arguments = parser.parse_args()
    epochs = arguments.epochs
    print(
        f"Keras {keras.__version__} on {keras.backend.backend()}: "
        f"two networks, {epochs} epochs each",
        flush=True,
    )

    progress = keras.utils.Progbar(2 * epochs, unit_name="epoch")
    show = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: progress.add(1)
    )
    x = np.linspace(0, 1, 201, dtype="float32")[:, None]
    found, histories = {}, {}
    for name, adapts in {"equal weights": False, "adapt": True}.items():
        network, histories[name] = train(adapts, epochs, [show])
        found[name] = network.predict(x, verbose=0)

    errors = {name: np.abs(u - exact(x)).max() for name, u in found.items()}
    print(
        f"\n{'weights':13} | residual |    start | residual | start | largest"
    )
    print(f"{'':13} |   weight |   weight |     loss |  loss |   error")
    for name, history in histories.items():
        weights = [f"{history[f'{term}_weight'][-1]:8.4f}" for term in TERMS]
        print(
            f"{name:13} | {' | '.join(weights)}"
            f" | {history['residual_loss'][-1]:8.2f}"
            f" | {history['start_loss'][-1]:5.2f} | {errors[name]:7.4f}"
        )
    if arguments.picture:
        save_picture(arguments.picture, x, found)
    equal, adapted = errors.values()
    if adapted < equal:
        print(
            f"adapt made the largest error {equal / adapted:.1f} times smaller."
        )
    else:
        print(f"adapt did not help: {adapted / equal:.1f} times the error.")


if __name__ == "__main__":
    main()
