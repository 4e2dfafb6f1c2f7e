"""Loss terms that layers add, and numbers that they use, as the weights move: `loss_terms.md`."""

import itertools

import keras
import numpy as np
import pytest
from common import X, Y

from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeightScheduler

in_both_modes = pytest.mark.parametrize(
    "eager", [False, pytest.param(True, marks=pytest.mark.deep)]
)
FACTORS = [0.0, 0.5, 1.0, 1.0]


class Penalty(keras.layers.Layer):
    def call(self, inputs):
        self.add_loss(keras.ops.mean(keras.ops.square(inputs)))
        return inputs


class Annealed(keras.Model):
    hides_losses = False

    @property
    def losses(self):
        return [] if self.hides_losses else super().losses

    def compute_loss(self, *args, **kwargs):
        added = sum(self.losses)
        self.hides_losses = True
        try:
            loss = super().compute_loss(*args, **kwargs)
        finally:
            self.hides_losses = False
        return loss + self.compound.combine({"size": added})


def two_outputs(layer, make=keras.Model):
    inputs = keras.Input((4,))
    features = layer(keras.layers.Dense(3, name="trunk")(inputs))
    easy = keras.layers.Dense(1, name="easy")(features)
    hard = keras.layers.Dense(2, name="hard")(features)
    return make(inputs, {"easy": easy, "hard": hard})


def fit(model, *callbacks, loss_weights, epochs=4, run_eagerly=False):
    loss = {"easy": "mse", "hard": "mse"}
    optimizer = keras.optimizers.SGD(0.05)
    model.compile(optimizer, loss, loss_weights=loss_weights, run_eagerly=run_eagerly)
    arguments = {"batch_size": 10, "shuffle": False, "verbose": 0, "validation_data": (X, Y)}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **arguments).history


class Parameters(keras.callbacks.Callback):
    """The losses of the model after each epoch."""

    def __init__(self):
        super().__init__()
        self.by_epoch = []

    def on_epoch_end(self, epoch, logs=None):
        self.by_epoch.append(self.model.get_weights())


@in_both_modes
def test_term_that_a_layer_adds_has_a_weight_beside_those_of_the_outputs(eager):
    dwa = DynamicWeightAverage({"easy": 1.0, "hard": 3.0}, temperature=0.2)
    schedule = LossWeightScheduler({"size": 2.0}, lambda epoch: {"size": FACTORS[epoch]})
    model = two_outputs(Penalty(), Annealed)
    model.compound = CompoundLoss(["size"], schedule)
    plain, parameters = two_outputs(keras.layers.Identity()), Parameters()
    plain.set_weights(model.get_weights())
    history = fit(
        model, dwa, schedule, parameters, loss_weights=dwa.loss_weights, run_eagerly=eager
    )

    fit(plain, loss_weights={"easy": 1.0, "hard": 3.0}, epochs=1)
    for ours, theirs in zip(parameters.by_epoch[0], plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)  # The term's factor was 0.
    assert history["size_weight"] == [0.0, 1.0, 2.0, 2.0]
    assert history["hard_weight"][3] != 3.0
    logs = {key: np.array(values) for key, values in history.items()}
    weights = [logs[f"{name}_weight"] for name in ("easy", "hard", "size")]
    for prefix in ("", "val_"):
        losses = [logs[f"{prefix}{name}_loss"] for name in ("easy", "hard", "size")]
        total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
        np.testing.assert_allclose(logs[f"{prefix}loss"], total, rtol=1e-5)
        base_loss = losses[0] + 3.0 * losses[1] + 2.0 * losses[2]
        np.testing.assert_allclose(logs[f"{prefix}base_loss"], base_loss, rtol=1e-5)


class ReverseGradient(keras.layers.Layer):
    def build(self, input_shape):
        self.scale = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs):
        return keras.ops.stop_gradient((1 + self.scale) * inputs) - self.scale * inputs


@in_both_modes
def test_number_that_a_layer_uses_follows_a_weight(eager):
    reverse, parameters = ReverseGradient(), Parameters()
    schedule = LossWeightScheduler(["easy", "hard"], lambda epoch: {"hard": FACTORS[epoch]})
    follow = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: reverse.scale.assign(
            float(schedule.loss_weights["hard"])
        )
    )
    model = two_outputs(reverse)
    model.get_layer("easy").trainable = model.get_layer("hard").trainable = False
    before = model.get_layer("trunk").get_weights()[0]
    history = fit(
        model, schedule, follow, parameters, loss_weights=schedule.loss_weights, run_eagerly=eager
    )
    trunks = [before, *(weights[0] for weights in parameters.by_epoch)]
    # At first, no gradient passes the layer; then, one that increases the losses does.
    moved = [np.abs(new - old).max() for old, new in itertools.pairwise(trunks)]
    assert moved[0] == 0.0 < min(moved[1:])
    assert history["val_base_loss"] == sorted(history["val_base_loss"])
