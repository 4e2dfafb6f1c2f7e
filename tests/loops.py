"""A custom training loop per backend, as a user would write it."""

import keras
import numpy as np
from common import BACKEND

if BACKEND == "tensorflow":
    import tensorflow as tf

    def train_loop(model, optimizer, compound, dwa, x, y, epochs, batch_size, compiled=True):
        """Trains in order; returns the weights that each epoch had."""

        def train_step(x, y):
            with tf.GradientTape() as tape:
                loss = compound(y, model(x, training=True))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)

        if compiled:
            train_step = tf.function(train_step)
        return _epochs(train_step, dwa, x, y, epochs, batch_size)

elif BACKEND == "torch":
    import torch

    def train_loop(model, optimizer, compound, dwa, x, y, epochs, batch_size, compiled=True):
        """Trains in order; returns the weights that each epoch had."""

        def forward(x, y):
            return compound(y, model(x, training=True))

        if compiled:
            forward = torch.compile(forward)

        def train_step(x, y):
            model.zero_grad()
            y = {name: torch.as_tensor(target) for name, target in y.items()}
            forward(torch.as_tensor(x), y).backward()
            gradients = [variable.value.grad for variable in model.trainable_variables]
            with torch.no_grad():
                optimizer.apply(gradients, model.trainable_variables)

        return _epochs(train_step, dwa, x, y, epochs, batch_size)

else:
    import jax

    def train_loop(model, optimizer, compound, dwa, x, y, epochs, batch_size, compiled=True):
        """Trains in order; returns the weights that each epoch had."""
        optimizer.build(model.trainable_variables)

        def compute_loss(trainable, non_trainable, dwa_variables, x, y):
            y_pred, non_trainable = model.stateless_call(trainable, non_trainable, x, training=True)
            loss, dwa_variables = compound.stateless_call(dwa_variables, y, y_pred)
            return loss, (non_trainable, dwa_variables)

        def train_step(state, x, y):
            trainable, non_trainable, optimizer_variables, dwa_variables = state
            gradients, (non_trainable, dwa_variables) = jax.grad(compute_loss, has_aux=True)(
                trainable, non_trainable, dwa_variables, x, y
            )
            trainable, optimizer_variables = optimizer.stateless_apply(
                optimizer_variables, gradients, trainable
            )
            return trainable, non_trainable, optimizer_variables, dwa_variables

        if compiled:
            train_step = jax.jit(train_step)

        def stateful_step(x, y):
            of_model = model.trainable_variables, model.non_trainable_variables
            groups = *of_model, optimizer.variables, dwa.variables
            state = [[variable.value for variable in group] for group in groups]
            for group, values in zip(groups, train_step(state, x, y), strict=True):
                for variable, value in zip(group, values, strict=True):
                    variable.assign(value)

        return _epochs(stateful_step, dwa, x, y, epochs, batch_size)


def _epochs(train_step, dwa, x, y, epochs, batch_size):
    weights = []
    for _ in range(epochs):
        weights.append([float(weight) for weight in dwa.loss_weights.values()])
        for start in range(0, len(x), batch_size):
            batch = slice(start, start + batch_size)
            train_step(x[batch], {name: target[batch] for name, target in y.items()})
        dwa.step()
    return np.array(weights)


def value_and_gradient(function, point, compiled=False):
    """The value and gradient of a scalar function at a NumPy array."""
    if BACKEND == "tensorflow":
        point = tf.convert_to_tensor(point)
        if compiled:
            function = tf.function(function)
        with tf.GradientTape() as tape:
            tape.watch(point)
            value = function(point)
        return float(value), tape.gradient(value, point).numpy()
    if BACKEND == "torch":
        point = torch.tensor(point, requires_grad=True)
        value = (torch.compile(function) if compiled else function)(point)
        value.backward()
        return value.item(), point.grad.numpy()
    with keras.StatelessScope():
        both = jax.value_and_grad(function)
        value, gradient = (jax.jit(both) if compiled else both)(point)
    return float(value), np.asarray(gradient)
