"""Uses of private Keras attributes that have no public equivalent.

If a later Keras drops an attribute, the error names it.
"""

from typing import Any

import keras


def compiled_loss_weights(model: keras.Model) -> Any:
    """What `model` got as `compile(loss_weights=...)`; None if it got nothing.

    `Model.get_compile_config()` is public, but serializes the weights, so ours look like any other.
    """
    compile_loss = _private(model, "_compile_loss")
    return None if compile_loss is None else _private(compile_loss, "_user_loss_weights")


def has_several_losses(model: keras.Model) -> bool:
    """Whether Keras tracks more than one loss. It does not before it has built them.

    `Model.metrics` is public, but also has the user's metrics.
    """
    compile_loss = _private(model, "_compile_loss")
    return compile_loss is not None and len(compile_loss.metrics) > 1


def track(model: keras.Model, metric: keras.metrics.Metric) -> None:
    """Sets `metric` as the attribute of its name, replacing a former one. Works on built models.

    A built model refuses new state, so its tracker is unlocked for the assignment, as in
    `Layer.enable_lora`.
    """
    tracker = _private(model, "_tracker")
    locked, unlock, lock, untrack = (
        _private(tracker, name) for name in ("locked", "unlock", "lock", "untrack")
    )
    unlock()
    try:
        untrack(getattr(model, metric.name, None))
        setattr(model, metric.name, metric)
    finally:
        if locked:
            lock()


def _private(owner: Any, attribute: str) -> Any:
    try:
        return getattr(owner, attribute)
    except AttributeError as error:
        raise RuntimeError(
            f"Keras {keras.__version__} has no `{type(owner).__name__}.{attribute}`, which this "
            "release of keras_dwa relies on. Upgrade keras_dwa, or use an earlier Keras."
        ) from error
