"""A search of static weights: one model for all trials, and KerasTuner, which makes one for each.

    KERAS_BACKEND=jax python benchmarks/searching.py

Both train the same number of trials of ten short epochs, from the same start. The one model is
compiled once, because its weights are variables. KerasTuner's models have numbers in
`loss_weights`, and it writes each trial's best parameters to a file. Each round searches in both
ways, in turn, in one process. The ratios are taken within a round.
"""

import os
import tempfile

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import keras_tuner
import numpy as np
from harness import interleaved, parse, print_table, ratios, shown
from models import SIZES, build, data, names

from keras_dwa import LossWeighting

OUTPUTS = 8


class Static(keras_tuner.HyperModel):
    def build(self, hp):
        model, _ = build(OUTPUTS, moving=False)
        weights = {name: hp.Float(name, 0.01, 1.0, sampling="log") for name in names(OUTPUTS)}
        losses = dict.fromkeys(weights, "mse")
        model.compile(keras.optimizers.SGD(1e-3), losses, loss_weights=weights)
        return model


def row(trials, steps, epochs, rounds):
    batch = SIZES["small"][2]
    x, y = data(OUTPUTS, steps * batch)
    fit = {"batch_size": batch, "epochs": epochs, "verbose": 0}

    def search_with_one_model():
        model, _ = build(OUTPUTS, moving=False)
        weighting = LossWeighting(names(OUTPUTS))
        losses = dict.fromkeys(names(OUTPUTS), "mse")
        model.compile(keras.optimizers.SGD(1e-3), losses, loss_weights=weighting.loss_weights)
        model.optimizer.build(model.trainable_variables)
        variables = model.variables + model.optimizer.variables
        start = [keras.ops.convert_to_numpy(variable).copy() for variable in variables]
        for draw in 10 ** np.random.default_rng(0).uniform(-2, 0, (trials, OUTPUTS)):
            for variable, value in zip(variables, start, strict=True):
                variable.assign(value)
            weighting.assign(dict(zip(weighting.outputs, draw, strict=True)))
            model.fit(x, y, callbacks=[weighting], **fit)

    def search_with_a_model_for_each():
        with tempfile.TemporaryDirectory() as folder:
            objective = keras_tuner.Objective("loss", direction="min")
            tuner = keras_tuner.RandomSearch(
                Static(), objective, max_trials=trials, directory=folder
            )
            tuner.search(x, y, **fit)

    runs = {"one model": search_with_one_model, "KerasTuner": search_with_a_model_for_each}
    for run in runs.values():
        run()
    taken = interleaved(runs, rounds)
    times = [f"{sorted(taken[name])[rounds // 2]:.1f}" for name in runs]
    ratio = shown(ratios(taken, "KerasTuner", "one model"), 1)
    return keras.backend.backend(), trials, steps * epochs, *times, ratio


def main():
    is_quick = parse(__doc__).quick
    # torch compiles only on request, and its eager steps take ten times as long.
    long = [] if keras.backend.backend() == "torch" else [(12, 100)]
    sizes = [(2, 5)] if is_quick else [(12, 10), *long]
    epochs, rounds = (2, 1) if is_quick else (10, 3)
    columns = ["backend", "trials", "steps a trial", "one model, s", "KerasTuner, s"]
    rows = [row(trials, steps, epochs, rounds) for trials, steps in sizes]
    print_table([*columns, "KerasTuner / one model"], rows)


if __name__ == "__main__":
    main()
