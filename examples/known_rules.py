"""Rules for loss weights that people know by name, a few lines each.

    python examples/known_rules.py

You will see three tasks on turned handwritten digits trained under each rule
(but DTP, to copy), the weights that it ends with, and each task's metric on
test data. Takes about two minutes on two CPU cores. The last line says how much
better or worse than equal weights each rule is.

To use a rule, copy its class and the three functions above it.
`docs/known_rules.md` says where each is from, when its authors use it, and what
we found. The backend is the one that KERAS_BACKEND names: tensorflow, jax (if
it is unset) or torch.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from scipy.ndimage import rotate
from sklearn.datasets import load_digits

from keras_dwa import DynamicWeightAverage, LossWeighting


def losses_of(weighting, logs):
    """The losses in the order of the sorted names, the same for every file."""
    return np.array(
        [logs[f"{name}_loss"] for name in sorted(weighting.outputs)]
    )


def by_name(weighting, weights):
    return dict(zip(sorted(weighting.outputs), weights.tolist(), strict=True))


def softmax(values):
    unnormalized = np.exp(values - values.max())
    return unnormalized / unnormalized.sum()


class RandomWeights(LossWeighting):
    """K * softmax(z), z from a normal distribution: RLW, arXiv:2111.10603."""

    seed = 0

    def update(self, epoch, logs):
        draw = np.random.default_rng((self.seed, epoch)).normal(
            size=len(self.outputs)
        )
        return dict(zip(self.outputs, len(draw) * softmax(draw), strict=True))


class InverseLoss(LossWeighting):
    """1 / L_k, scaled to sum to K.

    The geometric mean of the losses (GLS), IMTL-L at its optimum and analytic
    uncertainty weighting (UW-O, arXiv:2408.07985) come to the same.
    """

    def update(self, epoch, logs):
        inverse = 1 / np.maximum(losses_of(self, logs), 1e-12)
        return by_name(self, len(inverse) * inverse / inverse.sum())


class SoftAdapt(LossWeighting):
    """softmax(beta * s), s_k = L_k(t) - L_k(t-1): arXiv:1912.12355, eq. 3."""

    beta = 0.1

    def update(self, epoch, logs):
        losses = losses_of(self, logs)
        former, self.state["losses"] = self.state.get("losses"), losses
        return (
            None
            if former is None
            else by_name(self, softmax(self.beta * (losses - former)))
        )


class ReLoBRaLo(LossWeighting):
    """Relative loss balancing with random lookback: arXiv:2110.09813, sec. 3.

    balanced(t, t') = K * softmax(L_k(t) / (T * L_k(t')))
    weight(t) = alpha * history(t) + (1 - alpha) * balanced(t, t-1)
    history(t) = weight(t-1) with the chance rho, else balanced(t, 0)
    """

    alpha, rho, temperature, seed = 0.999, 0.999, 0.1, 0

    def update(self, step, logs):
        losses = np.maximum(losses_of(self, logs), 1e-12)
        first, former = (
            self.state.get("first", losses),
            self.state.get("former"),
        )
        self.state["first"], self.state["former"] = first, losses
        if former is None:
            return None
        weights = np.array(
            [self.factors[name] for name in sorted(self.outputs)]
        )
        if np.random.default_rng((self.seed, step)).random() >= self.rho:
            weights = len(losses) * softmax(losses / first / self.temperature)
        balanced = len(losses) * softmax(losses / former / self.temperature)
        return by_name(self, self.alpha * weights + (1 - self.alpha) * balanced)


class LossBalanced(LossWeighting):
    """(L_k(t) / L_k(0)) ** alpha: loss-balanced task weighting, AAAI 2019."""

    alpha = 0.5

    def update(self, epoch, logs):
        losses = losses_of(self, logs)
        first = self.state.setdefault("first", losses)
        return by_name(self, (losses / np.maximum(first, 1e-12)) ** self.alpha)


class TaskPriority(LossWeighting):
    """-(1 - m_k) ** gamma * log(m_k), m_k a mean of a metric.

    Dynamic task priority (DTP), ECCV 2018. `metrics`: output name to the key of
    a metric in the logs, in (0, 1], larger is better.
    """

    metrics, gamma, alpha = {}, 1.0, 0.5

    def update(self, epoch, logs):
        new = np.array(
            [logs[self.metrics[name]] for name in sorted(self.outputs)]
        )
        mean = self.alpha * new + (1 - self.alpha) * self.state.get("mean", new)
        self.state["mean"] = mean = np.clip(mean, 1e-6, 1.0)
        return by_name(self, (1 - mean) ** self.gamma * -np.log(mean))


class MomentumDWA(DynamicWeightAverage):
    """Dynamic Weight Average whose factors keep a share of the former ones."""

    momentum = 0.7

    def update(self, epoch, logs):
        new, former = super().update(epoch, logs), self.factors
        share = self.momentum
        return new and {
            name: share * former[name] + (1 - share) * new[name] for name in new
        }


# The comparison: three tasks on handwritten digits.

TASKS = {
    "digit": "sparse_categorical_crossentropy",
    "angle": "mse",
    "upright": "mse",
}
TRAIN = 22 * 64


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


def gain(metrics, equal):
    """By how many percent the tasks are better than `equal`, on average."""
    signs = {metric: 1 if metric.endswith("↑") else -1 for metric in equal}
    return 100 * np.mean(
        [signs[name] * (metrics[name] / equal[name] - 1) for name in equal]
    )


# With the windows that their authors use: those of one batch move at each step.
RULES = {
    "equal": lambda: LossWeighting(list(TASKS)),
    "random": lambda: RandomWeights(list(TASKS), update_freq=1),
    "1 / loss": lambda: InverseLoss(list(TASKS)),
    "SoftAdapt": lambda: SoftAdapt(list(TASKS)),
    "ReLoBRaLo": lambda: ReLoBRaLo(list(TASKS), update_freq=1),
    "LBTW": lambda: LossBalanced(list(TASKS), update_freq=1),
    "momentum DWA": lambda: MomentumDWA(list(TASKS)),
}


def main(epochs):
    x, y = rotated_digits()
    train = x[:TRAIN], {name: target[:TRAIN] for name, target in y.items()}
    test = x[TRAIN:], {name: target[TRAIN:] for name, target in y.items()}
    print(
        f"Keras {keras.__version__} on {keras.backend.backend()}: "
        f"{epochs} epochs of each of {len(RULES)} rules"
    )
    print(f"{'weights in the last epoch':39} | on {len(test[0])} test images")
    columns = ["accuracy ↑", "degrees ↓", "error ↓"]
    print(f"{'':13} | " + " ".join(f"{name:>7}" for name in TASKS), end=" | ")
    print(" ".join(f"{name:>10}" for name in columns), flush=True)
    metrics = {}
    for name, new in RULES.items():
        keras.utils.set_random_seed(0)  # The same start and the same batches.
        model, weighting = build_model(), new()
        model.compile(
            optimizer=keras.optimizers.Adam(3e-3),
            loss=TASKS,
            loss_weights=weighting.loss_weights,
        )
        history = model.fit(
            *train,
            batch_size=64,
            epochs=epochs,
            verbose=0,
            callbacks=[weighting],
        ).history
        metrics[name] = task_metrics(model, *test)
        weights = [f"{history[f'{task}_weight'][-1]:7.3f}" for task in TASKS]
        values = [f"{value:10.4f}" for value in metrics[name].values()]
        print(
            f"{name:>13} | {' '.join(weights)} | {' '.join(values)}", flush=True
        )
    equal = metrics.pop("equal")
    gains = [f"{name} {gain(m, equal):+.0f}" for name, m in metrics.items()]
    print(f"Better than equal weights, in % on average: {', '.join(gains)}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    main(parser.parse_args().epochs)
