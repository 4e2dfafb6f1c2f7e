"""Weightings and compound losses in the config of a model, which Keras saves and loads."""

import keras
import numpy as np
import pytest
from common import LOSSES, TwoHeads, X, Y, one_backend

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


class Combined(TwoHeads):
    """The name of its compound loss comes after `loss_weighting`, that of others' weights."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return self.total(y, y_pred, sample_weight)


@register
class GivesWeighting(Combined):
    def __init__(self, weighting, **kwargs):
        super().__init__(**kwargs)
        self.total = CompoundLoss({"easy": own_loss, "hard": keras.losses.Huber()}, weighting)

    def get_config(self):
        return {**super().get_config(), "weighting": self.total.weighting}


@register
class GivesBoth(Combined):
    def __init__(self, weighting, total=None, **kwargs):
        super().__init__(**kwargs)
        self.weighting = weighting
        self.total = total or CompoundLoss({"easy": "mse", "hard": own_loss}, weighting)

    def get_config(self):
        return {**super().get_config(), "weighting": self.weighting, "total": self.total}

    @classmethod
    def from_config(cls, config):
        return cls(**keras.saving.deserialize_keras_object(config))


@register
class MakesWeighting(Combined):
    """Without a config of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        weighting = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
        self.total = CompoundLoss(LOSSES, weighting)


RULES = {
    "DWA": lambda: DynamicWeightAverage(BASE, temperature=0.2),
    "schedule": lambda: LossWeightScheduler(BASE, anneal),
    "by hand": lambda: LossWeighting(BASE),
    "own": lambda: HalveTheLarger(BASE, by=0.8),
}
CASES = [
    *((rule, lambda rule=rule: GivesWeighting(RULES[rule]())) for rule in RULES),
    ("DWA in both", lambda: GivesBoth(RULES["DWA"]())),
    ("DWA of its own", lambda: MakesWeighting()),
]


def fit(model, *callbacks, **arguments):
    arguments = {"batch_size": 8, "shuffle": False, "verbose": 0, **arguments}
    callbacks = [model.total.weighting, *callbacks]
    return model.fit(X, Y, callbacks=callbacks, **arguments).history


@pytest.mark.parametrize("make_model", [make for _, make in CASES], ids=[case for case, _ in CASES])
def test_loaded_model_is_as_the_saved_one_and_goes_on_as_that_would(make_model, tmp_path):
    model = make_model()
    model.compile(keras.optimizers.Adam(0.01))
    model.total.weighting.assign({"hard": 0.75})
    checkpoint = keras.callbacks.ModelCheckpoint(f"{tmp_path}/{{epoch}}.keras")
    history = fit(model, checkpoint, epochs=6)
    evaluated = model.evaluate(X, Y, verbose=0, return_dict=True)
    last = keras.models.load_model(tmp_path / "6.keras")
    assert last.evaluate(X, Y, verbose=0, return_dict=True) == evaluated
    assert "easy_loss" in evaluated

    loaded = keras.models.load_model(tmp_path / "3.keras")
    weighting = loaded.total.weighting
    assert getattr(loaded, "weighting", weighting) is weighting
    resumed = fit(loaded, initial_epoch=3, epochs=6)
    assert resumed == {key: values[3:] for key, values in history.items()}
    for ours, theirs in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert weighting.factors == model.total.weighting.factors
    assert repr(weighting) == repr(model.total.weighting)
    np.testing.assert_equal(dict(weighting.state), dict(model.total.weighting.state))


@one_backend
@pytest.mark.parametrize("rule", RULES)
def test_config_makes_the_same_weighting_anew(rule):
    weighting = RULES[rule]()
    weighting.verbose = 1
    config = keras.saving.serialize_keras_object(weighting)
    anew = keras.saving.deserialize_keras_object(config)
    assert type(anew) is type(weighting)
    assert anew.get_config() == weighting.get_config()


@one_backend
def test_compound_loss_of_names_alone_has_a_config():
    compound = CompoundLoss(["easy", "hard"], LossWeighting(BASE))
    config = keras.saving.serialize_keras_object(compound)
    assert repr(keras.saving.deserialize_keras_object(config)) == repr(compound)


class Schedule:
    def __call__(self, epoch, factors):
        return None


def not_registered(epoch, factors):
    return None


@one_backend
@pytest.mark.parametrize("schedule", [not_registered, lambda epoch, factors: None, Schedule()])
def test_schedule_that_keras_could_not_load_is_refused_when_it_is_saved(schedule, tmp_path):
    model = GivesWeighting(LossWeightScheduler(BASE, schedule))
    model.compile("sgd")
    with pytest.raises(ValueError, match=r"(?s)Found <.*register_keras_serializable"):
        fit(model, keras.callbacks.ModelCheckpoint(tmp_path / "model.keras"))
