"""Searches static loss weights for the tasks of `digits.py`: one model, compiled once.

    python examples/search_weights.py

The first trial has equal weights, the second those that `adapt` finds, the others draw weights
around these. All start from the same parameters and see the same batches. The best trial is the one
whose tasks are, on average, the most percent better than with equal weights, on validation data.
`--picture FILE` draws the trials. The backend is the one that KERAS_BACKEND names: tensorflow, jax
(if it is unset) or torch.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from digits import TASKS, build_model, split_digits, task_metrics
from matplotlib.figure import Figure

from keras_dwa import LossWeighting

VALIDATION = 320


def parts():
    """Data for training, validation and test, as (x, y) each."""
    (x, y), test = split_digits()
    train, validation = slice(VALIDATION, None), slice(VALIDATION)
    split = [(x[part], {name: y[name][part] for name in y}) for part in (train, validation)]
    return *split, test


def search(number, epochs):
    """Of each trial the weights, and the metrics of validation and of test."""
    train, *unseen = parts()
    keras.utils.set_random_seed(0)
    model, weighting = build_model(), LossWeighting(list(TASKS))
    model.compile(keras.optimizers.Adam(3e-3), TASKS, loss_weights=weighting.loss_weights)
    model.optimizer.build(model.trainable_variables)
    variables = model.variables + model.optimizer.variables
    start = [keras.ops.convert_to_numpy(variable).copy() for variable in variables]

    weighting.adapt(model, *train)
    equal = [1 / weight for weight in weighting.base_weights.values()]
    drawn = len(TASKS) * np.random.default_rng(0).dirichlet([2] * len(TASKS), number - 2)
    trials, progress = [], keras.utils.Progbar(number, unit_name="trial")
    for factors in [equal, [1] * len(TASKS), *drawn]:
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        weighting.assign(dict(zip(TASKS, factors, strict=True)))
        keras.utils.set_random_seed(0)  # The same batches.
        model.fit(*train, batch_size=64, epochs=epochs, verbose=0, callbacks=[weighting])
        weights = [float(weight) for weight in weighting.loss_weights.values()]
        trials.append((weights, *(task_metrics(model, *data) for data in unseen)))
        progress.add(1)
    return trials


def gain(metrics, equal):
    """By how many percent the tasks are better, on average."""
    signs = {metric: 1 if metric.endswith("↑") else -1 for metric in equal}
    return 100 * np.mean([signs[name] * (metrics[name] / equal[name] - 1) for name in equal])


def draw(trials, best, path):
    """Two metrics of all trials against each other."""
    _, angle, upright = trials[0][1]
    axes = Figure(layout="constrained").subplots()
    points = np.array([[validation[angle], validation[upright]] for _, validation, _ in trials])
    axes.scatter(*points.T, color="0.5")
    axes.margins(0.15)
    for number, label in {0: "equal weights", 1: "adapt", best: "best"}.items():
        axes.annotate(label, points[number], (0, 8), textcoords="offset points", ha="center")
    axes.scatter(*points[best], s=120, facecolors="none", edgecolors="black")
    axes.set(xlabel=angle, ylabel=upright, title="validation")
    axes.figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--picture", metavar="FILE")
    arguments = parser.parse_args()
    trials = search(arguments.trials, arguments.epochs)
    _, equal, _ = trials[0]
    gains = [gain(validation, equal) for _, validation, _ in trials]
    best = int(np.argmax(gains))

    columns = [f"{name:>6}" for name in TASKS] + [" ".join(name.split()[-2:]) for name in equal]
    print("\ntrial | " + " | ".join(columns) + " |   gain")
    for number, (weights, validation, _) in enumerate(trials):
        values = zip([*weights, *validation.values()], columns, strict=True)
        cells = " | ".join(f"{value:{len(column)}.4f}" for value, column in values)
        print(f"{number + 1:5} | {cells} | {gains[number]:+4.1f} %")
    print(f"\nThe best is trial {best + 1}. On test data, equal weights, adapt, and the best:")
    for name in equal:
        print(f"{name:25} | " + " | ".join(f"{trials[n][2][name]:8.4f}" for n in (0, 1, best)))
    if arguments.picture:
        draw(trials, best, arguments.picture)


if __name__ == "__main__":
    main()
