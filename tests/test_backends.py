"""The shortcuts that a backend has compute what `keras.ops` do."""

import keras
import numpy as np
import pytest
from common import BACKEND

from keras_dwa import CompoundLoss, LossWeighting
from keras_dwa._backends import Backend, backend

NAMES = list("abc")
NOT_ON_JAX = pytest.mark.skipif(BACKEND == "jax", reason="has no float64 by default")
FLOAT64 = pytest.param("float64", marks=NOT_ON_JAX)


@pytest.fixture
def compound():
    return CompoundLoss(NAMES, LossWeighting({"a": 3.0, "b": 0.5, "c": 1.0}))


def record(compound):
    return keras.ops.convert_to_numpy(compound.weighting.variables[-1])


@pytest.mark.parametrize("dtype", ["float32", FLOAT64, "bfloat16", "int32"])
@pytest.mark.parametrize("samples", [1, 20, np.int64(20), "tensor"])
@pytest.mark.parametrize("is_list", [True, False])
def test_loss_and_record_are_those_of_keras_ops(compound, monkeypatch, dtype, samples, is_list):
    terms = keras.ops.cast(keras.ops.convert_to_tensor([2.0, -4.0, 1.0]), dtype)
    if samples == "tensor":
        samples = keras.ops.convert_to_tensor(20)
    values = dict(zip(NAMES, keras.ops.unstack(terms), strict=True)) if is_list else terms
    losses, records = [], []
    for used in (backend, Backend()):
        monkeypatch.setattr("keras_dwa._compound_loss.backend", used)
        monkeypatch.setattr("keras_dwa._loss_record.backend", used)
        losses.append(compound.combine(values, samples))
        records.append(record(compound))
        compound.weighting.reset()
    ours, expected = losses
    assert ours.dtype == expected.dtype
    assert float(ours) == float(expected) == 5.0
    np.testing.assert_array_equal(*records)
    assert records[0].tolist() == [[2.0 * (n := int(samples)), -4.0 * n, n, n], [2.0, -4.0, 1, 1]]


def test_terms_of_several_dtypes_and_numbers(compound):
    terms = keras.ops.cast([2.0, 3.0], "bfloat16")
    values = {"a": terms[0], "b": keras.ops.cast(terms[1], "float32"), "c": 1}
    assert float(compound.combine(values)) == 8.5
    assert float(compound.combine({**values, "c": np.float64(2.0)})) == 9.5
    assert record(compound)[1].tolist() == [4.0, 6.0, 3.0, 2.0]


def test_scope_without_side_effects_has_none(compound):
    with keras.StatelessScope() as scope:
        compound.combine(keras.ops.ones(3))
    assert record(compound).tolist() == [[0.0] * 4] * 2
    new = scope.get_current_value(compound.weighting.variables[-1])
    assert keras.ops.convert_to_numpy(new).tolist() == [[1.0] * 4] * 2


def test_record_within_a_layer_of_mixed_precision(compound):
    class Combine(keras.layers.Layer):
        def call(self, terms):
            return compound.combine(terms)

    Combine(dtype="mixed_bfloat16")(keras.ops.ones(3))
    assert record(compound)[1].tolist() == [1.0] * 4


@pytest.mark.skipif(BACKEND != "torch", reason="torch's own")
class TestTorch:
    def test_autocast_leaves_loss_gradient_and_record_in_float32(self, compound):
        import torch

        terms = torch.tensor([1 / 3, 2.0, 0.1], requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compound.combine(dict(zip(NAMES, terms.unbind(), strict=True)), samples=3)
        assert loss.dtype == torch.float32
        np.testing.assert_allclose(loss.item(), 2.1, rtol=1e-6)
        (gradient,) = torch.autograd.grad(loss, terms)
        assert gradient.tolist() == [3.0, 0.5, 1.0]
        np.testing.assert_allclose(record(compound)[0], [1.0, 6.0, 0.3, 3.0], rtol=1e-6)

    @pytest.mark.parametrize("samples", [1, 3])
    def test_compiled_whole_with_gradient_and_record(self, compound, samples):
        import torch

        compiled = []

        def compiler(graph, inputs):
            compiled.append(graph)
            return graph

        @torch.compile(fullgraph=True, backend=compiler)
        def step(terms):
            return compound.combine(terms, samples)

        terms = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
        step(terms)
        compound.weighting.reset()
        for _ in range(2):
            loss = step(terms)
        assert len(compiled) == 1
        assert loss.item() == 8.0
        (gradient,) = torch.autograd.grad(loss, terms)
        assert gradient.tolist() == [3.0, 0.5, 1.0]
        assert record(compound)[1].tolist() == [2.0, 4.0, 8.0, 2.0]

    def test_a_loss_times_an_entry_compiles_whole_and_follows_it(self):
        import torch

        weighting = LossWeighting(NAMES)
        entry = weighting.loss_weights["b"]

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(loss):
            return keras.ops.multiply(loss, entry)

        for factor in (1.0, 0.25, 0.0):
            weighting.assign({"b": factor})
            assert step(torch.tensor(2.0)).item() == 2 * factor

    @pytest.mark.parametrize("samples", [1, 3])
    def test_eager_step_takes_the_shortcuts_and_records_no_graph(
        self, compound, samples, monkeypatch
    ):
        import torch

        for name in ("combine", "add_batch"):
            monkeypatch.setattr(Backend, name, None)
        terms = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
        compound.combine(terms, samples)
        compound.combine(dict(zip(NAMES, terms.unbind(), strict=True)), samples)
        assert not compound.weighting.variables[-1].value.requires_grad
        assert record(compound)[1].tolist() == [2.0, 4.0, 8.0, 2.0]

    def test_weights_and_record_get_no_gradient(self, compound):
        import torch

        variables = [v.value.clone().requires_grad_() for v in compound.weighting.variables]
        terms = torch.ones(3, requires_grad=True)
        loss, _ = compound.stateless_combine(variables, terms)
        gradients = torch.autograd.grad(loss, [terms, *variables], allow_unused=True)
        assert gradients[0].tolist() == [3.0, 0.5, 1.0]
        assert gradients[1:] == (None, None)
