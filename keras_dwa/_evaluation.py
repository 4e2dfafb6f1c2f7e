"""The losses of a model as it is, by an evaluation that leaves no trace."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_dwa._backends import backend
from keras_dwa._ledger import Vector, repeat_count
from keras_dwa._loss_weights import LossWeights
from keras_dwa._sums import TrackerSums
from keras_dwa._wiring import records


def evaluated_sums(model: keras.Model, weights: LossWeights, arguments: dict[str, Any]) -> Vector:
    """The `Segment.sums` of an evaluation: NaN where the model has no metric of a loss.

    Args:
        model: a model that was shown to the weighting.
        weights: those of the weighting.
        arguments: those of `evaluate`.
    """
    with _restored(model, weights):
        weights.clear_record()
        model.evaluate(**{"verbose": 0, **arguments})
        if records(model, weights):
            return repeat_count(weights.recorded())
        return TrackerSums(model, weights.names).take(weights.vector.current)


@contextlib.contextmanager
def _restored(model: keras.Model, weights: LossWeights) -> Iterator[None]:
    """Puts back what an evaluation changes: metrics, the state of layers and of seeds."""
    # The metrics may hide the record.
    variables = [*model.non_trainable_variables, *model.metrics_variables, *weights.variables]
    values = [keras.ops.copy(variable) for variable in variables]
    added = weights.marks.added
    with backend.restored_random_state():
        try:
            yield
        finally:
            model.reset_metrics()  # Those that the evaluation made.
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
            weights.marks.added = added
