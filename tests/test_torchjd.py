"""Side by side with TorchJD's DWA, the reference for the numbers."""

import contextlib

import keras
import numpy as np
import pytest
from common import BACKEND, SAMPLES, X, Y, heads

from keras_dwa import DynamicWeightAverage

if BACKEND != "torch":
    pytest.skip("TorchJD runs on torch", allow_module_level=True)

import torch
from torchjd.scalarization import DWA


@pytest.mark.parametrize("seed", range(20))
def test_same_epoch_losses_give_the_same_weights(seed):
    random = np.random.default_rng(seed)
    count, temperature = random.integers(1, 9), random.uniform(0.3, 5)
    sign = random.choice([-1, 1], size=count)
    names = [f"task_{k}" for k in range(count)]
    reference = DWA(temperature=temperature)
    dwa = DynamicWeightAverage(names, temperature=temperature)
    for _ in range(8):
        averages = torch.tensor(sign * random.uniform(0.1, 3, size=count), requires_grad=True)
        (expected,) = torch.autograd.grad(reference(averages), averages)
        weights = [float(weight) for weight in dwa.loss_weights.values()]
        np.testing.assert_allclose(weights, expected, rtol=1e-6)
        reference.step()
        dwa.step(dict(zip(names, averages.detach().tolist(), strict=True)))


def test_changed_signs_give_the_same_weights():
    reference, dwa = DWA(), DynamicWeightAverage(["a", "b"])
    for losses in ([1.0, 2.0], [-0.5, 1.0]):
        reference(torch.tensor(losses))
        reference.step()
        with contextlib.nullcontext() if losses[0] > 0 else pytest.warns(UserWarning, match="sign"):
            weights = dwa.step(dict(zip("ab", losses, strict=True)))
    unit = torch.ones(2, requires_grad=True)
    (expected,) = torch.autograd.grad(reference(unit), unit)
    np.testing.assert_allclose(list(weights.values()), expected, rtol=1e-6)


def test_training_ends_at_the_parameters_of_a_loop_with_torchjd():
    model = keras.Model(*heads())
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())

    dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
    model.compile(
        keras.optimizers.SGD(0.1), {"easy": "mse", "hard": "mse"}, loss_weights=dwa.loss_weights
    )
    model.fit(X, Y, batch_size=8, epochs=6, shuffle=False, verbose=0, callbacks=[dwa])

    reference = DWA(temperature=0.2)
    optimizer = torch.optim.SGD(clone.parameters(), lr=0.1)
    targets = {name: torch.tensor(target) for name, target in Y.items()}
    for _ in range(6):
        for start in range(0, SAMPLES, 8):
            batch = slice(start, start + 8)
            outputs = clone(torch.tensor(X[batch]))
            losses = [((outputs[name] - targets[name][batch]) ** 2).mean() for name in Y]
            optimizer.zero_grad()
            reference(torch.stack(losses)).backward()
            optimizer.step()
        reference.step()

    for ours, theirs in zip(model.get_weights(), clone.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert abs(float(dwa.loss_weights["easy"]) - 1) > 0.01
