"""Weightings and compound losses in the config of a model, which Keras saves and loads."""

import keras
import numpy as np
import pytest
from common import TwoHeads, X, Y, fit, one_backend

from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeighting, LossWeightScheduler

BASE = {"easy": 3.0, "hard": 0.5}
register = keras.saving.register_keras_serializable("tests")


@register
def anneal(epoch, factors):
    return {"easy": 1 / (1 + epoch)}


@register
def own_loss(y_true, y_pred):
    return keras.ops.mean(keras.ops.abs(y_true - y_pred), axis=-1)


@register
class HalveTheLarger(LossWeighting):
    def __init__(self, outputs, by=0.5, **kwargs):
        super().__init__(outputs, **kwargs)
        self.by = by

    def get_config(self):
        return {**super().get_config(), "by": self.by}

    def update(self, epoch, logs):
        self.state["epochs"] = self.state.get("epochs", 0) + np.ones(1)
        larger = max(self.outputs, key=lambda name: logs[f"{name}_loss"])
        return {larger: self.by * self.factors[larger]}


@register
class MakesWeighting(TwoHeads):
    """The name of its compound loss sorts after `loss_weighting`, where others have weights."""

    def __init__(self, weighting=None, **kwargs):
        super().__init__(**kwargs)
        weighting = weighting or DynamicWeightAverage(BASE, temperature=0.2)
        self.total = CompoundLoss({"easy": own_loss, "hard": keras.losses.Huber()}, weighting)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return self.total(y, y_pred, sample_weight)


@register
class GivesWeighting(MakesWeighting):
    def get_config(self):
        return {**super().get_config(), "weighting": self.total.weighting}


@pytest.mark.parametrize(
    "make_model",
    [
        pytest.param(lambda: GivesWeighting(HalveTheLarger(BASE, by=0.8)), id="own rule"),
        pytest.param(MakesWeighting, marks=one_backend, id="DWA that the model makes"),
    ],
)
def test_loaded_model_is_as_the_saved_one_and_continues_as_that_would(make_model, tmp_path):
    model = make_model()
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9))
    model.total.weighting.assign({"hard": 0.75})
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "model.keras")
    fit(model, model.total.weighting, checkpoint, epochs=2)
    evaluated = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert "easy_loss" in evaluated
    history = fit(model, model.total.weighting, initial_epoch=2, epochs=4)

    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(X, Y, verbose=0, return_dict=True) == evaluated
    weighting, expected = loaded.total.weighting, model.total.weighting
    assert fit(loaded, weighting, initial_epoch=2, epochs=4) == history
    assert repr(weighting) == repr(expected)
    np.testing.assert_equal(dict(weighting.state), dict(expected.state))


@one_backend
@pytest.mark.parametrize(
    ("rule", "arguments"),
    [
        (LossWeighting, {"update_freq": 3, "verbose": 1}),
        (DynamicWeightAverage, {"temperature": 0.2}),
        (LossWeightScheduler, {"schedule": anneal}),
    ],
)
def test_config_has_all_arguments_also_in_that_of_a_compound_loss_of_names_alone(rule, arguments):
    compound = CompoundLoss(["easy", "hard"], rule(BASE, **arguments))
    config = keras.saving.serialize_keras_object(compound)
    loaded = keras.saving.deserialize_keras_object(config)
    assert repr(loaded) == repr(compound)
    assert ({"verbose": 0} | arguments).items() <= loaded.weighting.get_config().items()


@register
class CannotLoad:
    """A schedule that lacks `from_config`."""

    def __call__(self, epoch):
        return {}

    def get_config(self):
        return {}


@one_backend
@pytest.mark.parametrize("schedule", [lambda epoch, factors: None, CannotLoad()])
def test_schedule_that_keras_could_not_load_is_refused_when_it_is_saved(schedule):
    with pytest.raises(ValueError, match=r"(?s)Found .*register_keras_serializable"):
        LossWeightScheduler(BASE, schedule).get_config()


@one_backend
def test_schedule_may_be_an_object_that_keras_can_load(monkeypatch):
    monkeypatch.setattr(CannotLoad, "from_config", lambda config: CannotLoad(), raising=False)
    assert "schedule" in LossWeightScheduler(BASE, CannotLoad()).get_config()
