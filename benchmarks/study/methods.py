"""How the study weights the losses: method to weighting."""

import functools

import numpy as np
from own_rule import MomentumDWA, SoftAdapt
from vae import anneal

from keras_dwa import DynamicWeightAverage, LossWeighting, LossWeightScheduler

TEMPERATURES = (0.5, 1.0, 2.0, 5.0)
# How often static weights are drawn to find the best: as many runs more than any other method has.
BUDGET = 12


class RandomWeights(LossWeighting):
    """Weights drawn anew after each epoch, which sum to K (Lin et al., arXiv:2111.10603)."""

    seed = 0

    def update(self, epoch, logs):
        draw = np.random.default_rng((self.seed, epoch)).normal(size=len(self.outputs))
        weights = len(draw) * np.exp(draw) / np.exp(draw).sum()
        return dict(zip(self.outputs, weights.tolist(), strict=True))


def random(tasks, steps, seed):
    weighting = RandomWeights(tasks)
    weighting.seed = seed
    return weighting


def drawn(tasks, number):
    """The weights that the search tries: uniform on the simplex, times K."""
    weights = len(tasks) * np.random.default_rng((len(tasks), number)).dirichlet([1] * len(tasks))
    return dict(zip(tasks, weights.round(4).tolist(), strict=True))


def dwa(tasks, steps, seed, temperature):
    return DynamicWeightAverage(tasks, temperature)


# Each of the names of the tasks, of the steps of an epoch, and of the seed.
METHODS = {
    "equal": lambda tasks, steps, seed: LossWeighting(tasks),
    **{f"DWA, T = {t:g}": functools.partial(dwa, temperature=t) for t in TEMPERATURES},
    "DWA, momentum": lambda tasks, steps, seed: MomentumDWA(tasks),
    "DWA, 4 windows an epoch": lambda tasks, steps, seed: DynamicWeightAverage(
        tasks, update_freq=max(1, steps // 4)
    ),
    "SoftAdapt": lambda tasks, steps, seed: SoftAdapt(tasks),
    "random": random,
    # Of the VAE alone.
    "annealed KL": lambda tasks, steps, seed: LossWeightScheduler(tasks, anneal),
}
