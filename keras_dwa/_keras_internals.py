"""The two looks inside Keras that nothing public replaces.

Each fails with a message that names the attribute, should a later Keras drop it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras


def compiled_loss_weights(model: keras.Model) -> Any:
    """What `model` got as `compile(loss_weights=...)`; None if it got nothing.

    `Model.get_compile_config()` is public, but serializes: it cannot tell our weights from others.
    """
    compile_loss = _private(model, "_compile_loss")
    return None if compile_loss is None else _private(compile_loss, "_user_loss_weights")


@contextlib.contextmanager
def unlocked_tracker(model: keras.Model) -> Iterator[Any]:
    """Lets a built model take new state, as `Layer.enable_lora` does; yields its tracker."""
    tracker = _private(model, "_tracker")
    locked = _private(tracker, "locked")
    tracker.unlock()
    try:
        yield tracker
    finally:
        if locked:
            tracker.lock()


def _private(owner: Any, attribute: str) -> Any:
    try:
        return getattr(owner, attribute)
    except AttributeError as error:
        raise RuntimeError(
            f"Keras {keras.__version__} has no `{type(owner).__name__}.{attribute}`, which this "
            "release of keras_dwa relies on. Upgrade keras_dwa, or use an earlier Keras."
        ) from error
