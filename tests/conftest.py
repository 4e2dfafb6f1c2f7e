import gc
import os

# Devices on one CPU, for the tests of distribution. JAX reads this when it is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import hypothesis
import keras
import pytest
from common import BACKEND, MODES, forget_compiled_torch, mode_of

if BACKEND == "tensorflow":
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    # The suite traces far longer than it runs what is traced.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})

# Keras collects garbage after every test; what is imported need not be looked through each time.
gc.freeze()

# The same examples in every run; `nox -s properties` searches many others, `mutants` has few.
hypothesis.settings.register_profile("default", max_examples=200, derandomize=True, deadline=None)
hypothesis.settings.register_profile("few", max_examples=30, derandomize=True, deadline=None)
hypothesis.settings.register_profile("many", max_examples=100_000, deadline=None)
hypothesis.settings.load_profile("default")


@pytest.fixture(params=MODES)
def mode(request):
    """Arguments of `compile` for each way to run a step."""
    return mode_of(request)


@pytest.fixture(autouse=True)
def fresh_keras():
    keras.utils.set_random_seed(0)
    forget_compiled_torch()
    yield
    keras.utils.clear_session()


def pytest_addoption(parser):
    parser.addoption(
        "--modes",
        choices=["default", "some", "every"],
        default="some",
        help="run a test in the default mode of `compile`; eagerly, and where it is marked in "
        "every mode, too; or each in every mode",
    )


def pytest_configure(config):
    if BACKEND == "torch" and config.getoption("--modes") != "every":
        import torch

        # Traces and differentiates whole steps, but calls no C++ compiler, which takes minutes.
        torch.compiler.set_default_backend("aot_eager")
