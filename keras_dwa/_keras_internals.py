"""Uses of private Keras attributes that have no public equivalent."""

from typing import Any

import keras


def compiled_loss_weights(model: keras.Model) -> Any:
    """What `model` got as `compile(loss_weights=...)`; None if it got nothing.

    `Model.get_compile_config()` is public, but serializes the weights, so ours look like any other.
    """
    compile_loss = model._compile_loss
    return None if compile_loss is None else compile_loss._user_loss_weights


def has_several_losses(model: keras.Model) -> bool:
    """Whether Keras tracks more than one loss. It does not before it has built them.

    `Model.metrics` is public, but also has the user's metrics.
    """
    compile_loss = model._compile_loss
    return compile_loss is not None and len(compile_loss.metrics) > 1


def track(model: keras.Model, metric: keras.metrics.Metric) -> None:
    """Sets `metric` as the attribute of its name, replacing a former one. Works on built models.

    A built model refuses new state, so its tracker is unlocked for the assignment, as in
    `Layer.enable_lora`.
    """
    tracker = model._tracker
    was_locked = tracker.locked
    tracker.unlock()
    try:
        tracker.untrack(getattr(model, metric.name, None))
        setattr(model, metric.name, metric)
    finally:
        if was_locked:
            tracker.lock()
