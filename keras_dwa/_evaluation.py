"""Measures the losses of a model by an evaluation that leaves no trace."""

from typing import Any

import keras

from keras_dwa._backends import backend
from keras_dwa._ledger import Vector, repeat_count
from keras_dwa._loss_weights import LossWeights
from keras_dwa._sums import TrackerSums
from keras_dwa._wiring import records, tracked_metrics


def evaluated_sums(
    callback: keras.callbacks.Callback, weights: LossWeights, arguments: dict[str, Any]
) -> Vector:
    """The `Segment.sums` of an evaluation: NaN where the model has no metric of a loss.

    Restores what the evaluation changes: metrics, and the state of layers and seeds.

    Args:
        callback: a callback that has the model.
        weights: the callback's weights.
        arguments: the arguments of `evaluate`.
    """
    model, marks = callback.model, weights.marks
    variables = list(model.non_trainable_variables)
    variables += [variable for m in tracked_metrics(model) for variable in m.variables]
    values = [keras.ops.copy(variable) for variable in variables]
    parameters = [(variable, variable.value) for variable in model.trainable_variables]
    resets, added = marks.resets, marks.added
    with backend.restored_random_state():
        try:
            weights.clear_record()  # Keras does not if the model's `metrics` hides it.
            model.evaluate(**{"verbose": 0, **arguments})
            if records(model, weights):
                return repeat_count(weights.recorded())
            return TrackerSums(model, weights.names).take(weights.vector.current)
        finally:
            callback.model  # noqa: B018  # On JAX, restores the variables after an error.
            for variable, value in parameters:
                # On JAX, Keras loses the parameters if it cannot trace the step.
                if hasattr(value, "is_deleted") and not value.is_deleted():
                    variable.assign(value)
            model.reset_metrics()  # Those that the evaluation made.
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
            marks.resets, marks.added = resets, added
