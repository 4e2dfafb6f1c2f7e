"""Searches static loss weights for three tasks: one model, compiled once.

    python examples/search_weights.py

You will see a table of twelve trials on turned handwritten digits: the weights
of the three tasks, and their metrics on validation data. The first trial has
equal weights, the second those that `adapt` finds, the others random weights
around these. Takes a minute on two CPU cores. The last line says what the best
trial gains on test data; search_weights.png shows the trials (needs
matplotlib).

All trials start from the same parameters and see the same batches. The best is
the one whose tasks are, on average, the most percent better than with equal
weights. The backend is the one that KERAS_BACKEND names: tensorflow, jax (if it
is unset) or torch.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from scipy.ndimage import rotate
from sklearn.datasets import load_digits

from keras_dwa import LossWeighting

TASKS = {
    "digit": "sparse_categorical_crossentropy",
    "angle": "mse",
    "upright": "mse",
}
TEST, VALIDATION = 389, 320


def rotated_digits():
    """Images turned by up to 90 degrees either way, and the tasks' targets."""
    digits = load_digits()
    upright = (digits.images / 16).astype("float32")
    degrees = np.random.default_rng(0).uniform(-90, 90, size=len(upright))
    turned = [
        rotate(image, degree, reshape=False, order=1)
        for image, degree in zip(upright, degrees, strict=True)
    ]
    radians = np.radians(degrees)
    targets = {
        "digit": digits.target,
        "angle": np.stack([np.sin(radians), np.cos(radians)], axis=1).astype(
            "float32"
        ),
        "upright": upright.reshape(-1, 64),
    }
    return np.stack(turned)[..., None], targets


def build_model():
    image = keras.Input((8, 8, 1))
    trunk = keras.layers.Conv2D(32, 3, padding="same", activation="relu")(image)
    trunk = keras.layers.Conv2D(
        32, 3, strides=2, padding="same", activation="relu"
    )(trunk)
    trunk = keras.layers.Dense(128, activation="relu")(
        keras.layers.Flatten()(trunk)
    )
    heads = {
        "digit": keras.layers.Dense(10, activation="softmax"),
        "angle": keras.layers.Dense(2),
        "upright": keras.layers.Dense(64, activation="sigmoid"),
    }
    return keras.Model(
        image, {name: head(trunk) for name, head in heads.items()}
    )


def task_metrics(model, x, y):
    predictions = model.predict(x, verbose=0)
    sines, cosines = predictions["angle"].T
    turn = np.degrees(np.arctan2(sines, cosines) - np.arctan2(*y["angle"].T))
    return {
        "digit: accuracy ↑": np.mean(
            predictions["digit"].argmax(axis=1) == y["digit"]
        ),
        "angle: error in degrees ↓": np.abs((turn + 180) % 360 - 180).mean(),
        "upright: squared error ↓": np.square(
            predictions["upright"] - y["upright"]
        ).mean(),
    }


def parts():
    """Data for training, validation and test, as (x, y) each."""
    x, y = rotated_digits()
    slices = slice(VALIDATION, -TEST), slice(VALIDATION), slice(-TEST, None)
    return [
        (x[part], {name: target[part] for name, target in y.items()})
        for part in slices
    ]


def search(number, epochs):
    """Of each trial the weights, and the metrics of validation and of test."""
    train, *unseen = parts()
    keras.utils.set_random_seed(0)
    model, weighting = build_model(), LossWeighting(list(TASKS))
    model.compile(
        keras.optimizers.Adam(3e-3), TASKS, loss_weights=weighting.loss_weights
    )
    model.optimizer.build(model.trainable_variables)
    variables = model.variables + model.optimizer.variables
    start = [
        keras.ops.convert_to_numpy(variable).copy() for variable in variables
    ]

    weighting.adapt(model, *train)
    equal = [1 / weight for weight in weighting.base_weights.values()]
    drawn = len(TASKS) * np.random.default_rng(0).dirichlet(
        [2] * len(TASKS), number - 2
    )
    trials, progress = [], keras.utils.Progbar(number, unit_name="trial")
    for factors in [equal, [1] * len(TASKS), *drawn]:
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        weighting.assign(dict(zip(TASKS, factors, strict=True)))
        keras.utils.set_random_seed(0)  # The same batches.
        model.fit(
            *train,
            batch_size=64,
            epochs=epochs,
            verbose=0,
            callbacks=[weighting],
        )
        weights = [float(weight) for weight in weighting.loss_weights.values()]
        trials.append(
            (weights, *(task_metrics(model, *data) for data in unseen))
        )
        progress.add(1)
    return trials


def gain(metrics, equal):
    """By how many percent the tasks are better than `equal`, on average."""
    signs = {metric: 1 if metric.endswith("↑") else -1 for metric in equal}
    return 100 * np.mean(
        [signs[name] * (metrics[name] / equal[name] - 1) for name in equal]
    )


def save_picture(trials, best, path):
    """Two metrics of all trials against each other."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No picture: it needs matplotlib.")
        return
    _, angle, upright = trials[0][1]
    axes = Figure(layout="constrained").subplots()
    points = np.array(
        [
            [validation[angle], validation[upright]]
            for _, validation, _ in trials
        ]
    )
    axes.scatter(*points.T, color="0.5")
    axes.margins(0.15)
    for number, label in {0: "equal weights", 1: "adapt", best: "best"}.items():
        axes.annotate(
            label,
            points[number],
            (0, 8),
            textcoords="offset points",
            ha="center",
        )
    axes.scatter(*points[best], s=120, facecolors="none", edgecolors="black")
    axes.set(xlabel=angle, ylabel=upright, title="validation")
    axes.figure.savefig(path)
    print(f"Picture: {os.path.abspath(path)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument(
        "--picture", default="search_weights.png", metavar="FILE"
    )
    arguments = parser.parse_args()
    trials = search(arguments.trials, arguments.epochs)
    _, equal, _ = trials[0]
    gains = [gain(validation, equal) for _, validation, _ in trials]
    best = int(np.argmax(gains))

    columns = [f"{name:>6}" for name in TASKS] + [
        " ".join(name.split()[-2:]) for name in equal
    ]
    print("\ntrial | " + " | ".join(columns) + " |   gain")
    for number, (weights, validation, _) in enumerate(trials):
        values = zip([*weights, *validation.values()], columns, strict=True)
        cells = " | ".join(
            f"{value:{len(column)}.4f}" for value, column in values
        )
        print(f"{number + 1:5} | {cells} | {gains[number]:+4.1f} %")
    print(
        f"\nThe best is trial {best + 1}. "
        "On test data, equal weights, adapt, and the best:"
    )
    for name in equal:
        print(
            f"{name:25} | "
            + " | ".join(f"{trials[n][2][name]:8.4f}" for n in (0, 1, best))
        )
    if arguments.picture:
        save_picture(trials, best, arguments.picture)
    found, adapted = (gain(trials[n][2], trials[0][2]) for n in (best, 1))
    print(
        "On test data, on average over the tasks, the best trial gains "
        f"{found:+.1f} % over equal weights, and adapt {adapted:+.1f} %."
    )


if __name__ == "__main__":
    main()
