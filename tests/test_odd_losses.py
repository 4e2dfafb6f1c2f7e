"""In real training, epochs that would spoil a ratio: the weights stay sane and recover."""

import keras
import numpy as np
import pytest
from common import (
    X,
    Y,
    check_base_loss,
    check_run,
    dict_model,
    expected_weights,
    fit,
    floatx,
    joined,
    train,
)

from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeighting


def test_loss_that_overflows_float16_leaves_the_epoch_out():
    # The square of 1000 is beyond float16. Keras scales the losses of this optimizer, which skips
    # a step whose gradient is not finite; others would keep it in the parameters.
    huge = {**Y, "easy": np.full_like(Y["easy"], 1000)}
    with floatx("float16"):
        dwa, model = DynamicWeightAverage(["easy", "hard"], temperature=0.5), dict_model()
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05))
        first = train(model, dwa, optimizer=optimizer, epochs=1)
        with pytest.warns(UserWarning, match=r"after 2 epochs: .* 'easy' \(inf\) is not finite"):
            odd = fit(model, dwa, y=huge, initial_epoch=1, epochs=2)
        later = fit(model, dwa, initial_epoch=2, epochs=4)
    # Not NaN, as 0 times infinity would be.
    assert odd["easy_loss"] == odd["base_loss"] == [np.inf]
    # As if the epoch had not happened.
    history = joined(first, later)
    expected = expected_weights(history, dwa)[:, 0]
    np.testing.assert_allclose(history["easy_weight"], expected, rtol=5e-3)
    assert abs(expected[2] - 1) > 0.01


def test_losses_that_underflow_float16_are_no_alarm():
    with floatx("float16"):
        weighting = LossWeighting({"easy": 1e-3, "hard": 1e-3})
        tiny = {name: lambda y, y_pred: 1e-6 * keras.ops.mean(y_pred, axis=-1) ** 2 for name in Y}
        history = train(dict_model(), weighting, loss=tiny, epochs=1)
    assert history["loss"] == [0.0]


def test_bfloat16_as_floatx():
    with floatx("bfloat16"):
        dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
        history = train(dict_model(), dwa, validation_split=0.2)
    assert history["easy_weight"][2] != 1.0
    check_base_loss(history, {"easy": 1.0, "hard": 1.0}, rtol=0.02)


def test_batch_without_samples_adds_nothing():
    compound = CompoundLoss({"easy": "mse", "hard": "mae"}, LossWeighting(["easy", "hard"]))
    assert float(compound(Y, {name: target + 1 for name, target in Y.items()})) == 2.0
    recorded = compound.weighting._weights.recorded()
    nothing = {name: target[:0] for name, target in Y.items()}
    assert float(compound(nothing, nothing)) == 0.0
    np.testing.assert_array_equal(compound.weighting._weights.recorded(), recorded)


class EmptyThirdEpoch(keras.utils.PyDataset):
    # Keras also calls `on_epoch_end` before the first epoch.
    epoch = -1

    def on_epoch_end(self):
        self.epoch += 1

    def __len__(self):
        return 0 if self.epoch == 2 else 1

    def __getitem__(self, index):
        return X, Y


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_epoch_without_batches_holds_the_weights():
    dwa = DynamicWeightAverage({"easy": 3.0, "hard": 0.5}, temperature=0.2)
    with pytest.warns(UserWarning, match=r"holds the loss weights: epoch 3 had no batches\. "):
        history = train(dict_model(), dwa, EmptyThirdEpoch(), None, epochs=5)
    # What else Keras logs of such an epoch depends on the backend.
    assert len(history["easy_weight"]) == 4
    check_run({key: values[:2] + values[-2:] for key, values in history.items()}, dwa)
