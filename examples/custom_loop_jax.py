"""Dynamic Weight Average in a JAX training loop: `jax.value_and_grad` under `jax.jit`.

    python examples/custom_loop_jax.py

The three tasks of `digits.py`, without `compile` and `fit`. All state is passed in and out of the
step, the weights' as well: they are new values of an argument, not a reason to compile again.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
from digits import TASKS, build_model, rotated_digits

from keras_dwa import CompoundLoss, DynamicWeightAverage


def main(epochs):
    keras.utils.set_random_seed(0)
    x, y = rotated_digits()
    model, optimizer = build_model(), keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)

    dwa = DynamicWeightAverage(list(TASKS))
    compound = CompoundLoss(TASKS, dwa)

    def compute_loss(trainable, non_trainable, dwa_variables, x, y):
        y_pred, non_trainable = model.stateless_call(trainable, non_trainable, x, training=True)
        loss, dwa_variables = compound.stateless_call(dwa_variables, y, y_pred)
        return loss, (non_trainable, dwa_variables)

    @jax.jit
    def train_step(trainable, non_trainable, optimizer_variables, dwa_variables, x, y):
        (loss, (non_trainable, dwa_variables)), gradients = jax.value_and_grad(
            compute_loss, has_aux=True
        )(trainable, non_trainable, dwa_variables, x, y)
        trainable, optimizer_variables = optimizer.stateless_apply(
            optimizer_variables, gradients, trainable
        )
        return loss, (trainable, non_trainable, optimizer_variables, dwa_variables)

    trainable = [variable.value for variable in model.trainable_variables]
    non_trainable = [variable.value for variable in model.non_trainable_variables]
    optimizer_variables = [variable.value for variable in optimizer.variables]
    random = np.random.default_rng(0)
    for epoch in range(epochs):
        dwa_variables = [variable.value for variable in dwa.variables]
        order = random.permutation(len(x))
        for batch in np.array_split(order, len(x) // 64):
            loss, (trainable, non_trainable, optimizer_variables, dwa_variables) = train_step(
                trainable,
                non_trainable,
                optimizer_variables,
                dwa_variables,
                x[batch],
                {name: target[batch] for name, target in y.items()},
            )
        for variable, value in zip(dwa.variables, dwa_variables, strict=True):
            variable.assign(value)
        weights = dwa.step()  # Moves the weights by the epoch's averages.
        shown = ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items())
        print(f"epoch {epoch + 1}: last loss {float(loss):.4f}, next weights {shown}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
