import keras
import pytest
from common import MODES, forget_compiled_torch, mode_of


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
        "--torch-compile", action="store_true", help="run every test in torch's jit mode, too"
    )
