"""How the study weights the losses: method to weighting.

What was expected of the newer methods, written before their run, after a trial of `adapt` alone on
six families. `adapt` should gain most of what searched weights gain where these undo the scale of
losses (digits, speeds), change nothing that can be seen on dense, mtan and the tumours, and harm
the VAE, whose KL term is a penalty. DWA after `adapt` should be no better than `adapt`. 1 / loss
should be worse than `adapt`, for it gives the most weight to what is learnt already. ReLoBRaLo
should be near equal weights. A search from `adapt` should find what the other search finds, or
better. In raw units, `adapt` should be better than equal weights, and no weights as good as scaled
targets.
"""

import functools

import numpy as np
from known_rules import InverseLoss, MomentumDWA, RandomWeights, ReLoBRaLo, SoftAdapt
from vae import anneal

from keras_dwa import DynamicWeightAverage, LossWeighting, LossWeightScheduler

TEMPERATURES = (0.5, 1.0, 2.0, 5.0)
# How often static weights are drawn to find the best: as many runs more than any other method has.
BUDGET = 12


def relobralo(tasks, steps, seed):
    weighting = ReLoBRaLo(tasks, update_freq=1)
    weighting.seed = seed
    return weighting


def soft_adapt(tasks, steps, seed):
    weighting = SoftAdapt(tasks)
    # For the changes of an epoch, which are small: at 0.1, all weights would be about 1 / K.
    weighting.beta = 10.0
    return weighting


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


# Each of the names of the tasks, of the steps of an epoch, and of the seed. Those with "adapt" in
# their names adapt before they are trained.
METHODS = {
    "equal": lambda tasks, steps, seed: LossWeighting(tasks),
    **{f"DWA, T = {t:g}": functools.partial(dwa, temperature=t) for t in TEMPERATURES},
    "DWA, momentum": lambda tasks, steps, seed: MomentumDWA(tasks),
    "DWA, 4 windows an epoch": lambda tasks, steps, seed: DynamicWeightAverage(
        tasks, update_freq=max(1, steps // 4)
    ),
    "SoftAdapt": soft_adapt,
    "random": random,
    "adapt": lambda tasks, steps, seed: LossWeighting(tasks),
    "adapt, DWA": lambda tasks, steps, seed: DynamicWeightAverage(tasks),
    "1 / loss": lambda tasks, steps, seed: InverseLoss(tasks),
    "ReLoBRaLo": relobralo,
    # Of the VAE alone.
    "annealed KL": lambda tasks, steps, seed: LossWeightScheduler(tasks, anneal),
}
