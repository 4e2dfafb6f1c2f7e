"""KerasTuner's search, which copies the callbacks and makes a model for every trial."""

import keras
import keras_tuner
import pytest
from common import LOSSES, X, Y, check_run, dict_model, one_backend

from keras_dwa import DynamicWeightAverage


class Search(keras_tuner.HyperModel):
    """Keeps each trial's temperature and history."""

    def __init__(self, dwa=None):
        super().__init__()
        self.dwa, self.trials = dwa, []

    def build(self, hp):
        temperature = hp.Float("temperature", 0.1, 1.0)
        if self.dwa is None:
            self.own = DynamicWeightAverage(["easy", "hard"], temperature)
        else:
            self.dwa.temperature = temperature
        model = dict_model()
        optimizer = keras.optimizers.SGD(hp.Float("learning_rate", 0.01, 0.1, sampling="log"))
        model.compile(optimizer, LOSSES, loss_weights=(self.dwa or self.own).loss_weights)
        return model

    def fit(self, hp, model, *args, callbacks=(), **kwargs):
        if self.dwa is None:
            callbacks = [self.own, *callbacks]
        history = model.fit(*args, callbacks=callbacks, **kwargs)
        self.trials.append((hp.get("temperature"), hp.get("learning_rate"), history.history))
        return history


@one_backend
@pytest.mark.parametrize("given", ["to search", "in the hypermodel"])
def test_every_trial_starts_afresh_and_moves_the_weights_by_its_temperature(tmp_path, given):
    dwa = DynamicWeightAverage(["easy", "hard"]) if given == "to search" else None
    hypermodel = Search(dwa)
    tuner = keras_tuner.RandomSearch(
        hypermodel,
        keras_tuner.Objective("val_base_loss", "min"),
        max_trials=3,
        seed=0,
        directory=tmp_path,
    )
    callbacks = [] if dwa is None else [dwa]
    arguments = {"batch_size": 8, "validation_data": (X, Y), "verbose": 0, "callbacks": callbacks}
    tuner.search(X, Y, epochs=4, **arguments)
    for temperature, _, history in hypermodel.trials:
        check_run(history, DynamicWeightAverage(["easy", "hard"], temperature))
    temperatures, rates, _ = zip(*hypermodel.trials, strict=True)
    assert len(set(temperatures)) == len(set(rates)) == 3
    (best,) = tuner.get_best_models(1)
    results = best.evaluate(X, Y, batch_size=8, verbose=0, return_dict=True)
    score = tuner.oracle.get_best_trials(1)[0].score
    assert results["easy_loss"] + results["hard_loss"] == pytest.approx(score, rel=1e-5)
