"""What the study trains: families of tasks on data that scikit-learn ships or that is made here.

Each family has one network for all its tasks, and for each task a loss and a metric.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import dense_prediction
import digits
import keras
import numpy as np
import vae
from keras import layers
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.metrics import log_loss


@dataclass(frozen=True)
class Family:
    """Tasks that one network learns.

    Attributes:
        data: returns x and the targets by task, of all samples.
        samples: how many of these are for training, and how many for validation; the others are for
            the test.
        losses: task to loss, as `compile` takes it.
        build: makes the network, with an output for each task.
        metrics: from predictions and targets by task to the metric of each task.
        higher: the tasks whose metric is the better the higher it is.
        batch: samples of a batch.
        epochs: how long a run is.
    """

    data: Callable
    samples: tuple[int, int]
    losses: dict
    build: Callable
    metrics: Callable
    higher: tuple[str, ...]
    batch: int
    epochs: int

    @property
    def tasks(self):
        return tuple(self.losses)

    @property
    def metric_names(self):
        return self.tasks

    @property
    def judged(self):
        """The metrics that a comparison averages."""
        return self.tasks

    @property
    def references(self):
        """Name to tasks, of the runs that the others are compared with: each task alone."""
        return {f"{task} alone": [task] for task in self.tasks}

    def compiled(self, tasks, weighting, rate):
        """The network with the outputs of `tasks` alone."""
        whole = self.build()
        model = keras.Model(whole.input, {task: whole.output[task] for task in tasks})
        losses = {task: self.losses[task] for task in tasks}
        optimizer = keras.optimizers.Adam(rate)
        model.compile(optimizer, losses, loss_weights=weighting.loss_weights)
        return model


class Autoencoder(Family):
    """The VAE: its terms are no outputs, and neither of them is a task alone."""

    metric_names = ("negative ELBO", "reconstruction", "kl")
    judged = ("negative ELBO",)

    @property
    def references(self):
        return {"equal": self.tasks}

    def compiled(self, tasks, weighting, rate):
        model = self.build(weighting)
        model.compile(keras.optimizers.Adam(rate))
        return model


def digit_metrics(predictions, targets):
    found = {}
    if "digit" in predictions:
        found["digit"] = np.mean(predictions["digit"].argmax(axis=1) == targets["digit"])
    if "angle" in predictions:
        angle, truth = (np.arctan2(*values["angle"].T) for values in (predictions, targets))
        turn = np.degrees(angle - truth)
        found["angle"] = np.abs((turn + 180) % 360 - 180).mean()
    if "upright" in predictions:
        found["upright"] = np.square(predictions["upright"] - targets["upright"]).mean()
    return found


def dense_metrics(predictions, targets):
    names = {"semantic": "mIoU", "depth": "absolute error in metres"}
    names["normals"] = "mean angle in degrees"
    # The example's function takes all tasks.
    shown = {**targets, "semantic": np.zeros((*targets["depth"].shape[:3], 8)), **predictions}
    found = dense_prediction.task_metrics(shown, targets)
    return {task: found[f"{task}: {names[task]}"] for task in predictions}


def tumours():
    """From means and errors of ten measures of a tumour: its kind, and what is worst of four."""
    data = load_breast_cancer()
    order = np.random.default_rng(0).permutation(len(data.data))
    values = ((data.data - data.data.mean(axis=0)) / data.data.std(axis=0))[order].astype("float32")
    # Columns 20 to 29 are the worst of the ten measures.
    worst = {"radius": 20, "texture": 21, "smoothness": 24, "concavity": 26}
    targets = {name: values[:, [column]] for name, column in worst.items()}
    return values[:, :20], {"malignant": 1 - data.target[order, None], **targets}


def tumour_model(names):
    """A network with an output for the kind, and one for each measure."""
    inputs = keras.Input((20,))
    trunk = layers.Dense(32, activation="relu")(layers.Dense(32, activation="relu")(inputs))
    heads = {name: layers.Dense(1)(trunk) for name in names}
    return keras.Model(inputs, {"malignant": layers.Dense(1, "sigmoid")(trunk), **heads})


def tumour_metrics(predictions, targets, units):
    """Of the kind the cross-entropy, of the others the squared error in units of the variance."""
    return {
        task: log_loss(targets[task].ravel(), values.ravel().astype("float64"), labels=[0, 1])
        if task == "malignant"
        else np.square((values - targets[task]) / units.get(task, 1)).mean()
        for task, values in predictions.items()
    }


# Columns of the worst of ten measures. In their own units, untrained losses differ by millions.
MEASURES = {"area": 23, "texture": 21, "smoothness": 24}
UNITS = {name: load_breast_cancer().data[:, column].std() for name, column in MEASURES.items()}


def measures(is_raw):
    """As `tumours`, with other measures: in the units that they have, or scaled."""
    data = load_breast_cancer()
    x, targets = tumours()
    order = np.random.default_rng(0).permutation(len(data.data))
    found = {"malignant": targets["malignant"]}
    for name, column in MEASURES.items():
        values = data.data[order][:, [column]]
        scaled = (values - values.mean()) / UNITS[name]
        found[name] = (values if is_raw else scaled).astype("float32")
    return x, found


def measure_family(is_raw):
    return Family(
        functools.partial(measures, is_raw),
        (320, 120),
        {"malignant": "binary_crossentropy", **dict.fromkeys(MEASURES, "mse")},
        functools.partial(tumour_model, MEASURES),
        functools.partial(tumour_metrics, units=UNITS if is_raw else {}),
        (),
        batch=32,
        epochs=60,
    )


def speeds():
    """Four targets of eight numbers: a linear one, a product, a fast wave, and mostly noise.

    Made so that DWA should matter, for a reason that was written down before any run. The trunk is
    narrow and the run short, so that the tasks compete for both. The linear target is learnt within
    a few epochs, and its loss falls fast; the wave needs all the network and all the epochs. Under
    equal weights the quick ones take most of the first gradients; DWA, with weights up to exp(1 /
    T) times those of the quickest, gives the wave more just then. But the loss of the noisy target
    does not fall either, once what can be learnt of it is: DWA gives it as much as the wave, for
    nothing. So it should help the wave, unless the noise takes what it gains.

    Sizes were then chosen by training each task alone, so that the wave can be learnt. The others
    have a little noise, too: a target that a network fits exactly would decide every mean of
    relative errors.
    """
    random = np.random.default_rng(0)
    x = random.normal(size=(3000, 8))
    linear, first, second, wave, noisy = random.normal(size=(5, 8)) / np.sqrt(8)
    targets = {
        "linear": x @ linear,
        "product": (x @ first) * (x @ second),
        "wave": np.sin(3 * x @ wave),
        "noisy": 0.3 * x @ noisy,
    }
    noise = {"noisy": 1.0}
    return x.astype("float32"), {
        name: (values + noise.get(name, 0.2) * random.normal(size=len(x)))
        .astype("float32")
        .reshape(-1, 1)
        for name, values in targets.items()
    }


def speed_model():
    inputs = keras.Input((8,))
    trunk = layers.Dense(48, activation="relu")(layers.Dense(48, activation="relu")(inputs))
    names = ("linear", "product", "wave", "noisy")
    return keras.Model(inputs, {name: layers.Dense(1)(trunk) for name in names})


def mean_squared_errors(predictions, targets):
    return {task: np.square(values - targets[task]).mean() for task, values in predictions.items()}


def images():
    order = np.random.default_rng(0).permutation(1797)
    x = (load_digits().data / 16).astype("float32")[order]
    return x, {"images": x}


def vae_metrics(predictions, targets):
    """The negative ELBO, the sum of both terms, is what a VAE is for: in nats per image."""
    logits, pixels = predictions["logits"].astype("float64"), targets["images"]
    mean, log_variance = predictions["mean"], predictions["log_variance"]
    reconstruction = np.sum(np.logaddexp(0, logits) - pixels * logits, axis=1).mean()
    divergence = -0.5 * (1 + log_variance - mean**2 - np.exp(log_variance))
    kl = np.sum(divergence, axis=1).mean()
    return {"negative ELBO": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}


def dense_family(attention):
    return Family(
        data=functools.partial(dense_prediction.random_scenes, 288),
        samples=(128, 64),
        losses=dense_prediction.LOSSES,
        build=functools.partial(dense_prediction.build_model, attention),
        metrics=dense_metrics,
        higher=("semantic",),
        batch=8,
        epochs=15,
    )


FAMILIES = {
    "digits": Family(
        digits.rotated_digits,
        (17 * 64, 300),
        digits.TASKS,
        digits.build_model,
        digit_metrics,
        ("digit",),
        batch=64,
        epochs=40,
    ),
    "tumours": Family(
        tumours,
        (320, 120),
        {"malignant": "binary_crossentropy"}
        | dict.fromkeys(("radius", "texture", "smoothness", "concavity"), "mse"),
        functools.partial(tumour_model, ("radius", "texture", "smoothness", "concavity")),
        functools.partial(tumour_metrics, units={}),
        (),
        batch=32,
        epochs=40,
    ),
    "speeds": Family(
        speeds,
        (2000, 400),
        dict.fromkeys(("linear", "product", "wave", "noisy"), "mse"),
        speed_model,
        mean_squared_errors,
        (),
        batch=50,
        epochs=40,
    ),
    "vae": Autoencoder(
        images,
        (17 * 64, 300),
        dict.fromkeys(("reconstruction", "kl")),
        vae.VAE,
        vae_metrics,
        (),
        batch=64,
        epochs=40,
    ),
    "dense": dense_family(attention=False),
    "mtan": dense_family(attention=True),
    "raw units": measure_family(is_raw=True),
    "scaled": measure_family(is_raw=False),
}
