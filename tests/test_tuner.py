"""KerasTuner's search, which copies the callbacks and makes a model for each trial."""

from common import NAMES, X, Y, check_run, compiled, dict_model, one_backend

from keras_dwa import DynamicWeightAverage


@one_backend
def test_every_trial_starts_again_and_moves_the_weights_by_its_temperature(tmp_path, dwa):
    import keras_tuner

    trials = {}

    class Search(keras_tuner.HyperModel):
        def build(self, hp):
            dwa.temperature = hp.Float("temperature", 0.1, 1.0)
            return compiled(dict_model(), dwa)

        def fit(self, hp, model, *args, **kwargs):
            history = model.fit(*args, **kwargs)
            trials[hp.get("temperature")] = history.history
            return history

    objective = keras_tuner.Objective("val_base_loss", "min")
    tuner = keras_tuner.RandomSearch(Search(), objective, max_trials=2, seed=0, directory=tmp_path)
    fit = {"batch_size": 8, "validation_data": (X, Y), "verbose": 0}
    tuner.search(X, Y, epochs=3, callbacks=[dwa], **fit)
    assert len(trials) == 2
    for temperature, history in trials.items():
        check_run(history, DynamicWeightAverage(NAMES, temperature))
