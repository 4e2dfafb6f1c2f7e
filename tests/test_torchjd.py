"""Side by side with TorchJD's DWA, the reference for the numbers."""

import numpy as np
import pytest
from common import BACKEND

from keras_dwa import CompoundLoss, DynamicWeightAverage

if BACKEND != "torch":
    pytest.skip("TorchJD runs on torch", allow_module_level=True)

import torch
from torchjd.scalarization import DWA


@pytest.mark.filterwarnings("ignore:DynamicWeightAverage found that the loss of .* changed its")
@pytest.mark.parametrize("count", [1, 2, 7])
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
