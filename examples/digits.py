"""Three tasks on turned handwritten digits: equal weights, `adapt` and DWA.

    python examples/digits.py

You will see a network with three heads (which digit, by what angle, and the
upright image) trained three times: with equal loss weights; with weights that
`adapt` scaled so that each loss starts with a third of the total; and by
Dynamic Weight Average (DWA) after `adapt`. Takes about a minute on two CPU
cores. A table compares the three on test data, and the last line says where
they beat equal weights. digits.png shows the losses and weights of the last run
(needs matplotlib).

The backend is the one that KERAS_BACKEND names: tensorflow, jax (if it is
unset) or torch.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from scipy.ndimage import rotate
from sklearn.datasets import load_digits

from keras_dwa import DynamicWeightAverage, LossWeighting, plot_history

TASKS = {
    "digit": "sparse_categorical_crossentropy",
    "angle": "mse",
    "upright": "mse",
}


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


def train(x, y, epochs, weighting, adapts=False, callbacks=()):
    """The trained model and its history; the start and batches are the same."""
    keras.utils.set_random_seed(0)
    model = build_model()
    optimizer = keras.optimizers.Adam(3e-3)
    model.compile(
        optimizer=optimizer, loss=TASKS, loss_weights=weighting.loss_weights
    )
    if adapts:
        weighting.adapt(model, x, y)
    callbacks = [weighting, *callbacks]
    history = model.fit(
        x, y, epochs=epochs, batch_size=64, verbose=0, callbacks=callbacks
    )
    return model, history.history


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


def print_epochs(history):
    print(f"{'':5} | " + " | ".join(f"{name:^15}" for name in TASKS).rstrip())
    print("epoch | " + " | ".join(f"{'loss':>7} {'weight':>7}" for _ in TASKS))
    print("------+-" + "-+-".join("-" * 15 for _ in TASKS))
    epochs = len(history["loss"])
    for epoch in range(0, epochs, 1 + epochs // 15):
        cells = (
            f"{history[f'{name}_loss'][epoch]:7.4f}"
            f" {history[f'{name}_weight'][epoch]:7.3f}"
            for name in TASKS
        )
        print(f"{epoch + 1:5} | " + " | ".join(cells))


def split_digits():
    """Training and test data, as (x, y) each."""
    x, y = rotated_digits()
    # Batches of one size: the averages over batches and samples are the same.
    split = 22 * 64
    train_data = x[:split], {name: target[:split] for name, target in y.items()}
    return train_data, (
        x[split:],
        {name: target[split:] for name, target in y.items()},
    )


def compare(models, x, y):
    """Prints each task's metric, and returns them by the name of the model."""
    title = f"on {len(x)} test images"
    cells = " | ".join(f"{name:>15}" for name in models)
    print(f"\n{title:25} | {cells}")
    print("-" * 25 + "-+-" + "-+-".join("-" * 15 for _ in models))
    metrics = {
        name: task_metrics(model, x, y) for name, model in models.items()
    }
    for metric in metrics["equal weights"]:
        cells = (f"{values[metric]:15.4f}" for values in metrics.values())
        print(f"{metric:25} | " + " | ".join(cells))
    return metrics


def tasks_better(metrics, equal):
    """In how many tasks the metrics are better than those of equal weights."""
    return sum(
        metrics[name] > equal[name]
        if name.endswith("↑")
        else metrics[name] < equal[name]
        for name in equal
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--picture", default="digits.png", metavar="FILE")
    arguments = parser.parse_args()
    epochs = arguments.epochs

    train_data, test_data = split_digits()
    print(
        f"Keras {keras.__version__} on {keras.backend.backend()}: "
        f"three runs of {epochs} epochs",
        flush=True,
    )
    progress = keras.utils.Progbar(3 * epochs, unit_name="epoch")
    show = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: progress.add(1)
    )
    models = {}
    for name, rule in {
        "equal weights": LossWeighting,
        "adapt": LossWeighting,
        "DWA after adapt": DynamicWeightAverage,
    }.items():
        weighting, adapts = rule(list(TASKS)), name != "equal weights"
        models[name], history = train(
            *train_data, epochs, weighting, adapts, [show]
        )

    print("\nThe losses and weights of DWA after adapt:")
    print_epochs(history)
    metrics = compare(models, *test_data)
    if arguments.picture:
        try:
            plot_history(history).savefig(arguments.picture)
            print(f"Picture: {os.path.abspath(arguments.picture)}")
        except ImportError:
            print("No picture: it needs matplotlib.")
    equal = metrics.pop("equal weights")
    counts = [
        f"{name} in {tasks_better(values, equal)} of {len(equal)} tasks"
        for name, values in metrics.items()
    ]
    print(f"Better than equal weights, in this run: {', '.join(counts)}.")


if __name__ == "__main__":
    main()
