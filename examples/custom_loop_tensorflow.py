"""Dynamic Weight Average in a TensorFlow training loop: a GradientTape under `tf.function`.

    python examples/custom_loop_tensorflow.py

The three tasks of `digits.py`, without `compile` and `fit`.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import tensorflow as tf
from digits import TASKS, build_model, rotated_digits

from keras_dwa import CompoundLoss, DynamicWeightAverage


def main(epochs):
    keras.utils.set_random_seed(0)
    x, y = rotated_digits()
    batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x)).batch(64)
    model, optimizer = build_model(), keras.optimizers.Adam()

    dwa = DynamicWeightAverage(list(TASKS))
    compound = CompoundLoss(TASKS, dwa)

    @tf.function(reduce_retracing=True)
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = compound(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    for epoch in range(epochs):
        for batch in batches:
            loss = train_step(*batch)
        weights = dwa.step()  # Moves the weights by the epoch's averages.
        shown = ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items())
        print(f"epoch {epoch + 1}: last loss {float(loss):.4f}, next weights {shown}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
