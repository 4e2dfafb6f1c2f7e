import gc
import os

# JAX reads these when it is imported: devices on one CPU, for the tests of distribution, and on a
# GPU products as exact as NumPy's, with the same bits in every process.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=4 --xla_gpu_deterministic_ops=true"
)
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")

import hypothesis
import keras
import pytest
from common import BACKEND, COMPILED_AND_EAGER, MODES, NAMES

from keras_dwa import DynamicWeightAverage

if BACKEND == "tensorflow":
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    # The suite spends far longer on tracing than on running what it traced.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    tf.config.experimental.enable_tensor_float_32_execution(False)

if BACKEND == "torch":
    import torch

    # Traces and differentiates whole steps, but calls no C++ compiler, which takes minutes. torch
    # 2.11 has no such setting.
    if hasattr(torch.compiler, "set_default_backend"):
        torch.compiler.set_default_backend("aot_eager")

# Imported modules need not be scanned in each garbage collection.
gc.freeze()

# The same examples in every run. `nox -s properties` tries many others, `mutants` few.
hypothesis.settings.register_profile("default", max_examples=200, derandomize=True, deadline=None)
hypothesis.settings.register_profile("few", max_examples=30, derandomize=True, deadline=None)
hypothesis.settings.register_profile("many", max_examples=100_000, deadline=None)
hypothesis.settings.load_profile("default")


@pytest.fixture(
    params=[
        pytest.param(mode, marks=() if mode in COMPILED_AND_EAGER else pytest.mark.deep)
        for mode in MODES
    ]
)
def mode(request):
    """Arguments of `compile`: compiled and eager. `nox -s deep` adds the other ways."""
    return MODES[request.param]


@pytest.fixture
def dwa():
    return DynamicWeightAverage(NAMES, temperature=0.2)


@pytest.fixture(autouse=True)
def fresh_keras():
    keras.utils.set_random_seed(0)
    yield
    # On TensorFlow, collecting garbage after every test takes a sixth of the suite's time.
    keras.utils.clear_session(free_memory=False)
