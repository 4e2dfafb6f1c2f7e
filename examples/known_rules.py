"""Rules for loss weights that people know by name, a few lines each.

    python examples/known_rules.py

trains the three tasks of `digits.py` under each, and compares the tasks on test data with equal
weights. To use a rule, copy its class and the three functions above it. `docs/known_rules.md` says
where each is from, when its authors use it, and what we found.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from digits import TASKS, compare, split_digits, train

from keras_dwa import DynamicWeightAverage, LossWeighting


def losses_of(weighting, logs):
    """The losses, in the order of the sorted names: a file may have the outputs in another one."""
    return np.array([logs[f"{name}_loss"] for name in sorted(weighting.outputs)])


def by_name(weighting, weights):
    return dict(zip(sorted(weighting.outputs), weights.tolist(), strict=True))


def softmax(values):
    unnormalized = np.exp(values - values.max())
    return unnormalized / unnormalized.sum()


class RandomWeights(LossWeighting):
    """K * softmax(z), z drawn from a normal distribution: RLW, arXiv:2111.10603."""

    seed = 0

    def update(self, epoch, logs):
        draw = np.random.default_rng((self.seed, epoch)).normal(size=len(self.outputs))
        return dict(zip(self.outputs, len(draw) * softmax(draw), strict=True))


class InverseLoss(LossWeighting):
    """1 / L_k, scaled to sum to K: what the geometric mean of the losses (GLS), IMTL-L at its
    optimum and analytic uncertainty weighting (UW-O, arXiv:2408.07985) come to."""

    def update(self, epoch, logs):
        inverse = 1 / np.maximum(losses_of(self, logs), 1e-12)
        return by_name(self, len(inverse) * inverse / inverse.sum())


class SoftAdapt(LossWeighting):
    """softmax(beta * s), s_k = L_k(t) - L_k(t-1): arXiv:1912.12355, equation 3."""

    beta = 0.1

    def update(self, epoch, logs):
        losses = losses_of(self, logs)
        former, self.state["losses"] = self.state.get("losses"), losses
        return None if former is None else by_name(self, softmax(self.beta * (losses - former)))


class ReLoBRaLo(LossWeighting):
    """Relative loss balancing with random lookback: arXiv:2110.09813, section 3.

    balanced(t, t') = K * softmax(L_k(t) / (T * L_k(t')))
    weight(t) = alpha * history(t) + (1 - alpha) * balanced(t, t-1)
    history(t) = weight(t-1) with the chance rho, else balanced(t, 0)
    """

    alpha, rho, temperature, seed = 0.999, 0.999, 0.1, 0

    def update(self, step, logs):
        losses = np.maximum(losses_of(self, logs), 1e-12)
        first, former = self.state.get("first", losses), self.state.get("former")
        self.state["first"], self.state["former"] = first, losses
        if former is None:
            return None
        weights = np.array([self.factors[name] for name in sorted(self.outputs)])
        if np.random.default_rng((self.seed, step)).random() >= self.rho:
            weights = len(losses) * softmax(losses / first / self.temperature)
        balanced = len(losses) * softmax(losses / former / self.temperature)
        return by_name(self, self.alpha * weights + (1 - self.alpha) * balanced)


class LossBalanced(LossWeighting):
    """(L_k(t) / L_k(0)) ** alpha: loss-balanced task weighting (LBTW), AAAI 2019."""

    alpha = 0.5

    def update(self, epoch, logs):
        losses = losses_of(self, logs)
        first = self.state.setdefault("first", losses)
        return by_name(self, (losses / np.maximum(first, 1e-12)) ** self.alpha)


class TaskPriority(LossWeighting):
    """-(1 - m_k) ** gamma * log(m_k), m_k a mean of a metric: dynamic task priority, ECCV 2018.

    `metrics`: output name to the key of a metric in the logs, in (0, 1], larger is better.
    """

    metrics, gamma, alpha = {}, 1.0, 0.5

    def update(self, epoch, logs):
        new = np.array([logs[self.metrics[name]] for name in sorted(self.outputs)])
        mean = self.alpha * new + (1 - self.alpha) * self.state.get("mean", new)
        self.state["mean"] = mean = np.clip(mean, 1e-6, 1.0)
        return by_name(self, (1 - mean) ** self.gamma * -np.log(mean))


class MomentumDWA(DynamicWeightAverage):
    """Dynamic Weight Average whose factors keep a share of the former ones."""

    momentum = 0.7

    def update(self, epoch, logs):
        new, former = super().update(epoch, logs), self.factors
        share = self.momentum
        return new and {name: share * former[name] + (1 - share) * new[name] for name in new}


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
    train_data, test_data = split_digits()
    print(f"Keras {keras.__version__} on {keras.backend.backend()}: {epochs} epochs of each rule")
    models, last = {}, {}
    for name, new in RULES.items():
        models[name], history = train(*train_data, epochs, new())
        last[name] = ", ".join(f"{task} {history[f'{task}_weight'][-1]:.3f}" for task in TASKS)
        print(f"{name:>13}: weights in the last epoch: {last[name]}")
    compare(models, *test_data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    main(parser.parse_args().epochs)
