"""The rules of `examples/known_rules.py`, side by side with their originals or their papers."""

import numpy as np
import pytest
from common import BACKEND, one_backend
from known_rules import (
    InverseLoss,
    LossBalanced,
    MomentumDWA,
    RandomWeights,
    ReLoBRaLo,
    SoftAdapt,
    TaskPriority,
)

from keras_dwa import DynamicWeightAverage

NAMES = ["b", "c", "a"]
EPOCHS = np.random.default_rng(0).uniform(0.1, 3.0, (6, len(NAMES)))
with_its_package = pytest.mark.skipif(BACKEND != "torch", reason="where its package is installed")


def weights_of(rule, epochs=EPOCHS):
    """The weights after each epoch of losses, in the order of `NAMES`."""
    steps = [rule.step(dict(zip(NAMES, losses, strict=True))) for losses in epochs]
    return np.array([[weights[name] for name in NAMES] for weights in steps])


@with_its_package
def test_soft_adapt():
    from softadapt.algorithms import SoftAdapt as Reference

    rule, reference = SoftAdapt(NAMES), Reference(beta=SoftAdapt.beta, accuracy_order=1)
    found = weights_of(rule)
    for epoch in range(1, len(EPOCHS)):
        expected = reference.get_component_weights(*EPOCHS[: epoch + 1].T.tolist(), verbose=False)
        np.testing.assert_allclose(found[epoch], expected.numpy(force=True), rtol=1e-5)


@with_its_package
def test_inverse_loss_has_the_gradient_of_the_geometric_mean():
    import torch
    from torchjd.scalarization import GeometricMean

    for weights, epoch in zip(weights_of(InverseLoss(NAMES)), EPOCHS, strict=True):
        losses = torch.tensor(epoch, requires_grad=True)
        (gradient,) = torch.autograd.grad(GeometricMean()(losses), losses)
        np.testing.assert_allclose(weights, len(NAMES) * gradient / gradient.sum(), rtol=1e-5)


@one_backend
def test_random_weights_are_softmax_of_a_normal_draw_that_comes_back():
    names = ["a", "b"]
    rule = RandomWeights(names)
    weights = [rule.update(epoch, {}) for epoch in range(4000)]
    # The difference of two normal draws.
    logits = np.log([row["a"] / row["b"] for row in weights])
    assert abs(logits.mean()) < 0.1
    assert logits.std() == pytest.approx(np.sqrt(2), rel=0.05)
    assert weights[7] == RandomWeights(names).update(7, {})


@one_backend
@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_relobralo(rho):
    rule = ReLoBRaLo(NAMES)
    rule.alpha, rule.rho, rule.temperature = 0.9, rho, 0.5
    found, expected = weights_of(rule), np.ones(len(NAMES))

    def balanced(t, former):
        exponentials = np.exp(EPOCHS[t] / (0.5 * EPOCHS[former]))
        return len(NAMES) * exponentials / exponentials.sum()

    for t in range(1, len(EPOCHS)):
        history = expected if rho == 1.0 else balanced(t, 0)
        expected = 0.9 * history + (1 - 0.9) * balanced(t, t - 1)
        np.testing.assert_allclose(found[t], expected, rtol=1e-5)


@one_backend
def test_loss_balanced():
    found = weights_of(LossBalanced(NAMES), [(4.0, 1.0, 2.0), (1.0, 4.0, 2.0)])
    np.testing.assert_allclose(found, [[1.0, 1.0, 1.0], [0.5, 2.0, 1.0]])


@one_backend
def test_task_priority():
    rule = TaskPriority(NAMES)
    # Any key of the logs may be a metric.
    rule.metrics = {name: f"{name}_loss" for name in NAMES}
    rule.gamma, rule.alpha = 2.0, 0.25
    first, second = EPOCHS[:2] / EPOCHS.max()
    means = np.array([first, 0.25 * second + 0.75 * first])
    found = weights_of(rule, [first, second])
    np.testing.assert_allclose(found, -((1 - means) ** 2) * np.log(means), rtol=1e-5)


@one_backend
def test_momentum():
    rule, plain = MomentumDWA(NAMES), DynamicWeightAverage(NAMES)
    expected = np.ones(len(NAMES))
    for found, new in zip(weights_of(rule), weights_of(plain), strict=True):
        expected = 0.7 * expected + 0.3 * new
        np.testing.assert_allclose(found, expected, rtol=1e-5)
