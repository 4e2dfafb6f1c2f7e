"""The shortcuts of a backend compute the same as `keras.ops`."""

import keras
import numpy as np
import pytest
from common import BACKEND, one_backend

from keras_dwa import CompoundLoss, LossWeighting
from keras_dwa._backends import Backend, backend

if BACKEND == "torch":
    import torch

NAMES = list("abc")
of_torch = pytest.mark.skipif(BACKEND != "torch", reason="torch's shortcuts and compiler")
NOT_ON_JAX = pytest.mark.skipif(BACKEND == "jax", reason="has no float64 by default")
FLOAT64 = pytest.param("float64", marks=NOT_ON_JAX)


@pytest.fixture
def compound():
    return CompoundLoss(NAMES, LossWeighting({"a": 3.0, "b": 0.5, "c": 1.0}))


def record(compound):
    return keras.ops.convert_to_numpy(compound.weighting.variables[-1])


@pytest.mark.parametrize("dtype", ["float32", FLOAT64, "bfloat16", "int32"])
@pytest.mark.parametrize("samples", [1, np.int64(20), "tensor"])
@pytest.mark.parametrize("is_list", [True, False])
def test_loss_and_record_are_those_of_keras_ops(compound, monkeypatch, dtype, samples, is_list):
    terms = keras.ops.cast(keras.ops.convert_to_tensor([2.0, -4.0, 1.0]), dtype)
    values = dict(zip(NAMES, keras.ops.unstack(terms), strict=True)) if is_list else terms
    samples = keras.ops.convert_to_tensor(20) if samples == "tensor" else samples
    expected = np.outer([1, 1], int(samples) * np.array([2.0, -4.0, 1.0, 1.0]))
    for used in (backend, Backend()):
        monkeypatch.setattr("keras_dwa._compound_loss.backend", used)
        monkeypatch.setattr("keras_dwa._loss_record.backend", used)
        loss = compound.combine(values, samples)
        assert float(loss) == 5.0
        wide = "float64" if dtype == "float64" else "float32"
        assert keras.backend.standardize_dtype(loss.dtype) == wide
        np.testing.assert_array_equal(record(compound), expected)
        compound.weighting.reset()


@of_torch
def test_compiled_step_serves_batches_of_any_size(compound):
    @torch.compile(fullgraph=True)
    def step(x):
        return compound.combine(x.mean(0), samples=x.shape[0])

    with torch.compiler.set_stance("default"):
        step(torch.ones(8, 3)), step(torch.ones(5, 3))
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in (3, 7, 20):
            assert float(step(torch.ones(size, 3))) == 4.5
    assert record(compound)[0].tolist() == [43.0] * 4


def test_terms_of_several_dtypes_and_numbers(compound):
    terms = keras.ops.cast([2.0, 3.0], "bfloat16")
    values = {"a": terms[0], "b": keras.ops.cast(terms[1], "float32"), "c": 1}
    assert float(compound.combine(values)) == 8.5
    assert float(compound.combine({**values, "c": np.float64(2.0)})) == 9.5
    assert record(compound)[1].tolist() == [4.0, 6.0, 3.0, 2.0]


def test_scope_without_side_effects_has_none(compound):
    with keras.StatelessScope() as scope:
        compound.combine(keras.ops.ones(3))
    assert not record(compound).any()
    new = scope.get_current_value(compound.weighting.variables[-1])
    assert keras.ops.convert_to_numpy(new).tolist() == [[1.0] * 4] * 2


def test_record_within_a_layer_of_mixed_precision(compound):
    class Combine(keras.layers.Layer):
        def call(self, terms):
            return compound.combine(terms)

    Combine(dtype="mixed_bfloat16")(keras.ops.ones(3))
    assert record(compound)[1].tolist() == [1.0] * 4


@of_torch
@pytest.mark.parametrize(
    "way", ["eager", "autocast", pytest.param("compiled to native code", marks=pytest.mark.deep)]
)
def test_loss_gradient_and_record_are_in_float32(compound, monkeypatch, way):
    terms = keras.ops.convert_to_tensor([1 / 3, 2.0, 4.0]).requires_grad_()
    combine = compound.combine
    if way == "compiled to native code":
        combine = torch.compile(combine, fullgraph=True, backend="inductor")
    else:  # Takes the shortcuts.
        for name in ("combine", "add_batch"):
            monkeypatch.setattr(Backend, name, None)
    with torch.autocast(terms.device.type, torch.bfloat16, enabled=way == "autocast"):
        combine(terms, samples=1)
        loss = combine(dict(zip(NAMES, terms.unbind(), strict=True)), samples=3)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), 6.0, rtol=1e-6)
    (gradient,) = torch.autograd.grad(loss, terms)
    assert gradient.tolist() == [3.0, 0.5, 1.0]
    assert not compound.weighting.variables[-1].value.requires_grad
    np.testing.assert_allclose(record(compound), [[4 / 3, 8.0, 16.0, 4.0]] * 2, rtol=1e-6)


@of_torch
def test_loss_times_an_entry_compiles_whole_and_follows_it():
    weighting = LossWeighting(NAMES)
    entry = weighting.loss_weights["b"]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(loss):
        return keras.ops.multiply(loss, entry)

    for factor in (1.0, 0.25, 0.0):
        weighting.assign({"b": factor})
        assert step(keras.ops.convert_to_tensor(2.0)).item() == 2 * factor


@one_backend
def test_variables_are_whole_whatever_patterns_of_model_parallel_fit():
    devices = keras.distribution.list_devices("cpu")[:4]
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*"] = (None, "model")
    with keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch").scope():
        variables = CompoundLoss(NAMES, LossWeighting(NAMES)).weighting.variables
        assert all(variable.value.sharding.is_fully_replicated for variable in variables)
