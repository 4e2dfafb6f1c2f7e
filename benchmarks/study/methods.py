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


class InverseLoss(LossWeighting):
    """1 / loss of each epoch, which sum to K: what analytic uncertainty weighting comes to."""

    def update(self, epoch, logs):
        inverse = np.array([1 / max(logs[f"{name}_loss"], 1e-12) for name in self.outputs])
        weights = len(inverse) * inverse / inverse.sum()
        return dict(zip(self.outputs, weights.tolist(), strict=True))


class ReLoBRaLo(LossWeighting):
    """Relative loss balancing with random lookback, at each step: arXiv:2110.09813, section 3.

    With balanced(t') = K * softmax(L_k(t) / (T * L_k(t'))), the weights are

        lambda(t) = alpha * history(t) + (1 - alpha) * balanced(t-1)
        history(t) = lambda(t-1), or now and then, with the chance 1 - rho, balanced(0)
    """

    alpha, rho, temperature, seed = 0.999, 0.999, 0.1, 0

    def update(self, step, logs):
        losses = np.array([logs[f"{name}_loss"] for name in self.outputs])
        first, former = self.state.get("first", losses), self.state.get("former")
        self.state["first"], self.state["former"] = first, losses
        if former is None:
            return None

        def balanced(reference):
            logits = losses / (self.temperature * np.maximum(reference, 1e-12))
            unnormalized = np.exp(logits - logits.max())
            return len(losses) * unnormalized / unnormalized.sum()

        looks_back = np.random.default_rng((self.seed, step)).random() < self.rho
        history = np.array(list(self.factors.values())) if looks_back else balanced(first)
        weights = self.alpha * history + (1 - self.alpha) * balanced(former)
        return dict(zip(self.outputs, weights.tolist(), strict=True))


def relobralo(tasks, steps, seed):
    weighting = ReLoBRaLo(tasks, update_freq=1)
    weighting.seed = seed
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
    "SoftAdapt": lambda tasks, steps, seed: SoftAdapt(tasks),
    "random": random,
    "adapt": lambda tasks, steps, seed: LossWeighting(tasks),
    "adapt, DWA": lambda tasks, steps, seed: DynamicWeightAverage(tasks),
    "1 / loss": lambda tasks, steps, seed: InverseLoss(tasks),
    "ReLoBRaLo": relobralo,
    # Of the VAE alone.
    "annealed KL": lambda tasks, steps, seed: LossWeightScheduler(tasks, anneal),
}
