"""Loss weights in a JAX loop: `jax.value_and_grad` under `jax.jit`.

    python examples/custom_loop_jax.py

You will see a line for each epoch, with the loss and the weights of two tasks
on noisy handwritten digits: which digit, and the clean image. Dynamic Weight
Average (DWA) moves the weights from the third epoch on; any other weighting
fits in the same place. Takes ten seconds on two CPU cores. The last line is the
accuracy on unseen digits.

All state is passed into the step and returned by it, also that of the weights.
New weights are new values of an argument, so nothing is compiled again.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_dwa import CompoundLoss, DynamicWeightAverage

LOSSES = {"digit": "sparse_categorical_crossentropy", "clean": "mse"}
TRAIN = 22 * 64


def noisy_digits():
    """Images under noise; the targets are the digit and the clean image."""
    digits = load_digits()
    clean = (digits.data / 16).astype("float32")
    noise = np.random.default_rng(0).normal(0, 0.3, size=clean.shape)
    targets = {"digit": digits.target, "clean": clean}
    return (clean + noise).astype("float32"), targets


def build_model():
    image = keras.Input((64,))
    trunk = keras.layers.Dense(128, activation="relu")(image)
    digit = keras.layers.Dense(10, activation="softmax")(trunk)
    clean = keras.layers.Dense(64, activation="sigmoid")(trunk)
    return keras.Model(image, {"digit": digit, "clean": clean})


def show(epoch, loss, weights):
    shown = ", ".join(f"{name} {weights[name]:.3f}" for name in LOSSES)
    print(
        f"epoch {epoch + 1}: last loss {loss:.4f}, next weights {shown}",
        flush=True,
    )


def conclude(model, x, y):
    """Prints the accuracy on images that were not trained."""
    digits = keras.ops.convert_to_numpy(model(x[TRAIN:])["digit"]).argmax(
        axis=1
    )
    accuracy = np.mean(digits == y["digit"][TRAIN:])
    print(f"{accuracy:.0%} of {len(digits)} unseen digits are recognized.")


def values_of(variables):
    return [variable.value for variable in variables]


def assign(variables, values):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def main(epochs):
    keras.utils.set_random_seed(0)
    x, y = noisy_digits()
    model, optimizer = build_model(), keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)

    dwa = DynamicWeightAverage(list(LOSSES))
    compound = CompoundLoss(LOSSES, dwa)

    def compute_loss(trainable, dwa_variables, x, y):
        # The model has no other variables, such as those of normalization.
        y_pred, _ = model.stateless_call(trainable, [], x, training=True)
        return compound.stateless_call(dwa_variables, y, y_pred)

    @jax.jit
    def train_step(trainable, optimizer_variables, dwa_variables, x, y):
        compute = jax.value_and_grad(compute_loss, has_aux=True)
        (loss, dwa_variables), gradients = compute(
            trainable, dwa_variables, x, y
        )
        trainable, optimizer_variables = optimizer.stateless_apply(
            optimizer_variables, gradients, trainable
        )
        return loss, (trainable, optimizer_variables, dwa_variables)

    trainable = values_of(model.trainable_variables)
    optimizer_variables = values_of(optimizer.variables)
    random = np.random.default_rng(0)
    for epoch in range(epochs):
        state = trainable, optimizer_variables, values_of(dwa.variables)
        for batch in np.split(random.permutation(TRAIN), TRAIN // 64):
            targets = {name: target[batch] for name, target in y.items()}
            loss, state = train_step(*state, x[batch], targets)
        trainable, optimizer_variables, dwa_variables = state
        assign(dwa.variables, dwa_variables)
        weights = dwa.step()  # Moves the weights by the epoch's averages.
        show(epoch, float(loss), weights)
    assign(model.trainable_variables, trainable)
    conclude(model, x, y)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
