"""Rules of one's own for the loss weights: SoftAdapt, and Dynamic Weight Average with momentum.

    python examples/own_rule.py

trains the three tasks of `digits.py` under each, prints the losses and weights of each epoch, and
compares the tasks on test data with equal weights. The backend is the one that KERAS_BACKEND names:
tensorflow, jax (if it is unset) or torch.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np
from digits import TASKS, compare, print_epochs, split_digits, train

from keras_dwa import DynamicWeightAverage, LossWeighting


class SoftAdapt(LossWeighting):
    """exp(beta * s_k) / sum_i exp(beta * s_i), where s_k = L_k(t) - L_k(t-1): arXiv:1912.12355."""

    beta = 10.0

    def update(self, epoch, logs):
        names = sorted(self.outputs)
        losses = np.array([logs[f"{name}_loss"] for name in names])
        former, self.state["losses"] = self.state.get("losses"), losses
        if former is None:
            return None
        slopes = losses - former
        unnormalized = np.exp(self.beta * (slopes - slopes.max()))
        return dict(zip(names, unnormalized / unnormalized.sum(), strict=True))


class MomentumDWA(DynamicWeightAverage):
    """Dynamic Weight Average whose factors keep a share of the former ones."""

    momentum = 0.7

    def update(self, epoch, logs):
        new, former = super().update(epoch, logs), self.factors
        share = self.momentum
        return new and {name: share * former[name] + (1 - share) * new[name] for name in new}


def main(epochs):
    train_data, test_data = split_digits()
    models = {}
    for rule in (SoftAdapt(list(TASKS)), MomentumDWA(list(TASKS), temperature=0.5)):
        model, history = train(*train_data, epochs, rule)
        print(f"\n{rule}\n")
        print_epochs(history)
        models[type(rule).__name__] = model
    models["equal weights"], _ = train(*train_data, epochs, LossWeighting(list(TASKS)))
    compare(models, *test_data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=15)
    main(parser.parse_args().epochs)
