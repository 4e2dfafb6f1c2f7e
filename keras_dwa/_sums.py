"""What Keras has added to its sums of losses since the last reading."""

import keras
import numpy as np

from keras_dwa._backends import backend
from keras_dwa._ledger import Vector


class TrackerSums:
    """The sums in the metrics from which Keras computes the averages in its logs."""

    def __init__(self, model: keras.Model, names: tuple[str, ...]) -> None:
        self._model, self._names = model, names
        self.clear()

    def clear(self) -> None:
        """Assumes that all sums are zero."""
        self._last_sums = np.zeros(2 * len(self._names) + 1)

    def take(self, weights: Vector) -> Vector:
        """The `Segment.sums` of the batches since the last call, which had these weights."""
        trackers = {m.name: m for m in self._model.metrics if isinstance(m, keras.metrics.Mean)}
        keys = [f"{name}_loss" for name in self._names]
        # Keras logs the loss of a single output as `loss` alone, weighted.
        is_weighted = len(keys) == 1 and keys[0] not in trackers
        keys = ["loss"] if is_weighted else keys
        if not trackers.keys() >= {"loss", *keys}:
            return np.full_like(self._last_sums, np.nan)
        variables = [trackers[key].total for key in keys] + [trackers[key].count for key in keys]
        sums = backend.to_host([*variables, trackers["loss"].count])
        with np.errstate(invalid="ignore"):
            new = sums - self._last_sums
        self._last_sums = sums
        if is_weighted:
            new[0] /= weights[0] or np.nan  # At weight 0, the unweighted loss is unknown.
        # A custom step may not update `loss`.
        new[-1] = new[-1] or new[len(keys)]
        return new
