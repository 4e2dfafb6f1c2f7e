"""Loss weights in a torch loop, with a torch optimizer.

    python examples/custom_loop_torch.py

You will see a line for each epoch, with the loss and the weights of two tasks
on noisy handwritten digits: which digit, and the clean image. Dynamic Weight
Average (DWA) moves the weights from the third epoch on; any other weighting
fits in the same place. Takes ten seconds on two CPU cores. The last line is the
accuracy on unseen digits.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

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


def main(epochs):
    keras.utils.set_random_seed(0)
    x, y = noisy_digits()
    train = [(x[i], {name: y[name][i] for name in y}) for i in range(TRAIN)]
    batches = DataLoader(train, batch_size=64, shuffle=True)
    model = build_model()
    optimizer = torch.optim.Adam(model.parameters())

    dwa = DynamicWeightAverage(list(LOSSES))
    compound = CompoundLoss(LOSSES, dwa)

    for epoch in range(epochs):
        for images, targets in batches:
            loss = compound(targets, model(images, training=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights = dwa.step()  # Moves the weights by the epoch's averages.
        show(epoch, loss.item(), weights)
    conclude(model, x, y)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
