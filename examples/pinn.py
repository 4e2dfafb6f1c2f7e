"""A physics-informed network for a Poisson problem: residual and boundary terms, weighted.

    python examples/pinn.py

Solves u'' = -pi^2 sin(pi x) on [0, 1] with u(0) = u(1) = 0, whose solution is sin(pi x). The
network is small enough to write down with its second derivative, so that the example runs on any
backend: the one that KERAS_BACKEND names, tensorflow, jax (if it is unset) or torch.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras import ops

from keras_dwa import CompoundLoss, DynamicWeightAverage


class Network(keras.Model):
    """u(x) = sum_i c_i tanh(a_i x + b_i) + d, and u''(x)."""

    def __init__(self, dwa, width=32):
        super().__init__()
        self.inner = keras.layers.Dense(
            width, kernel_initializer=keras.initializers.RandomNormal(0, 3)
        )
        self.outer = keras.layers.Dense(1)
        self.compound = CompoundLoss(["residual", "boundary"], dwa)

    def build(self, input_shape):
        self.inner.build(input_shape)
        self.outer.build((None, self.inner.units))

    def call(self, x):
        wave = ops.tanh(self.inner(x))
        # tanh'' = -2 tanh (1 - tanh^2)
        curvature = -2 * wave * (1 - ops.square(wave)) * ops.square(self.inner.kernel)
        return {"u": self.outer(wave), "u_xx": ops.matmul(curvature, self.outer.kernel)}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        residual = y_pred["u_xx"] + np.pi**2 * ops.sin(np.pi * x)
        boundary = self(ops.convert_to_tensor([[0.0], [1.0]]))["u"]
        return self.compound.combine(
            {"residual": ops.mean(ops.square(residual)), "boundary": ops.mean(ops.square(boundary))}
        )


def main(epochs):
    keras.utils.set_random_seed(0)
    x = np.linspace(0, 1, 256, dtype="float32")[:, None]
    # The boundary counts as much as the residual, which is larger by far.
    dwa = DynamicWeightAverage({"residual": 1.0, "boundary": 100.0})
    network = Network(dwa)
    network.compile(optimizer=keras.optimizers.Adam(1e-2))
    history = network.fit(x, epochs=epochs, batch_size=64, verbose=0, callbacks=[dwa]).history

    for epoch in sorted({0, epochs // 4, epochs // 2, epochs - 1}):
        terms = (
            f"{name} {history[f'{name}_loss'][epoch]:.2e} (weight "
            f"{history[f'{name}_weight'][epoch]:.3g})"
            for name in ("residual", "boundary")
        )
        print(f"epoch {epoch + 1:4}:", ", ".join(terms))
    error = np.abs(network.predict(x, verbose=0)["u"] - np.sin(np.pi * x)).max()
    print(f"largest error against the exact solution: {error:.2e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=200)
    main(parser.parse_args().epochs)
