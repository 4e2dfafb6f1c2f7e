"""Loss terms that layers add, as in `loss_terms.md`."""

import keras
import numpy as np
from common import X, Y, check_base_loss, compiled, fit, heads

from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeightScheduler


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


def test_term_that_a_layer_adds_has_a_weight_beside_those_of_the_outputs():
    factors = [0.0, 0.5, 1.0, 1.0]
    dwa = DynamicWeightAverage({"easy": 1.0, "hard": 3.0}, temperature=0.2)
    schedule = LossWeightScheduler({"size": 2.0}, lambda epoch: {"size": factors[epoch]})
    inputs, outputs = heads()
    model = Annealed(inputs, {**outputs, "easy": Penalty()(outputs["easy"])})
    model.compound = CompoundLoss(["size"], schedule)
    compiled(model, dwa)
    history = fit(model, dwa, schedule, epochs=4, validation_data=(X, Y))
    assert history["size_weight"] == [0.0, 1.0, 2.0, 2.0]
    assert history["hard_weight"][3] != 3.0
    for prefix in ("", "val_"):
        parts = [
            np.multiply(history[f"{name}_weight"], history[f"{prefix}{name}_loss"])
            for name in ("easy", "hard", "size")
        ]
        np.testing.assert_allclose(history[f"{prefix}loss"], sum(parts), rtol=1e-5)
    check_base_loss(history, {"easy": 1.0, "hard": 3.0, "size": 2.0})
