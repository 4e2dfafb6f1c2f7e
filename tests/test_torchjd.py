"""Side by side with TorchJD's DWA, the reference for the numbers."""

import keras
import numpy as np
import pytest
from common import BACKEND, SAMPLES, X, Y, dict_model, train

from keras_dwa import CompoundLoss, DynamicWeightAverage

if BACKEND != "torch":
    pytest.skip("TorchJD runs on torch", allow_module_level=True)

import torch
from torchjd.scalarization import DWA


@pytest.mark.filterwarnings("ignore:DynamicWeightAverage found that the loss of .* changed its")
@pytest.mark.parametrize("count", range(1, 9))
def test_combine_and_step_are_as_torchjd_for_losses_of_any_sign(count):
    random, names = np.random.default_rng(count), [f"task_{k}" for k in range(count)]
    temperature = random.uniform(1, 5)
    dwa, reference = DynamicWeightAverage(names, temperature), DWA(temperature=temperature)
    compound = CompoundLoss(names, dwa)
    for batches in (2, 3, 0, 1, 2):
        signs = random.choice([-1, 1], size=count)
        for _ in range(batches):
            losses = torch.tensor(signs * random.uniform(0.5, 2, count), requires_grad=True)
            terms = dict(zip(names, losses.unbind(), strict=True))
            (ours,) = torch.autograd.grad(compound.combine(terms), losses)
            (expected,) = torch.autograd.grad(reference(losses), losses)
            np.testing.assert_allclose(ours, expected, rtol=1e-5)
        dwa.step()
        reference.step()


def test_training_ends_at_the_parameters_of_a_loop_with_torchjd():
    model, dwa = dict_model(), DynamicWeightAverage(["easy", "hard"], temperature=0.2)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    mse = {"easy": "mse", "hard": "mse"}
    train(model, dwa, loss=mse, batch_size=SAMPLES, epochs=6)

    reference, optimizer = DWA(temperature=0.2), torch.optim.SGD(clone.parameters(), lr=0.05)
    targets = {name: keras.ops.convert_to_tensor(target) for name, target in Y.items()}
    for _ in range(6):
        outputs = clone(X)
        losses = [((outputs[name] - targets[name]) ** 2).mean() for name in Y]
        optimizer.zero_grad()
        reference(torch.stack(losses)).backward()
        optimizer.step()
        reference.step()

    for ours, theirs in zip(model.get_weights(), clone.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert abs(dwa.step()["easy"] - 1) > 0.01
