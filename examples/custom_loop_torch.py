"""Dynamic Weight Average in a torch training loop, with a torch optimizer.

    python examples/custom_loop_torch.py

The three tasks of `digits.py`, without `compile` and `fit`.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
from digits import TASKS, build_model, rotated_digits
from torch.utils.data import DataLoader

from keras_dwa import CompoundLoss, DynamicWeightAverage


def main(epochs):
    keras.utils.set_random_seed(0)
    x, y = rotated_digits()
    samples = [(image, {name: y[name][i] for name in y}) for i, image in enumerate(x)]
    batches = DataLoader(samples, batch_size=64, shuffle=True)
    model = build_model()
    optimizer = torch.optim.Adam(model.parameters())

    dwa = DynamicWeightAverage(list(TASKS))
    compound = CompoundLoss(TASKS, dwa)

    for epoch in range(epochs):
        for images, targets in batches:
            loss = compound(targets, model(images, training=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights = dwa.step()  # Moves the weights by the epoch's averages.
        shown = ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items())
        print(f"epoch {epoch + 1}: last loss {loss.item():.4f}, next weights {shown}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
