"""What Keras, or a compound loss, has summed up of the losses since it was last asked."""

from collections.abc import Callable

import keras
import numpy as np

from keras_dwa._backends import backend
from keras_dwa._ledger import Vector
from keras_dwa._loss_record import LossRecord
from keras_dwa._loss_weights import Marks


class NewSums:
    """The sums of the batches since they were last taken, of all ranks that train one model.

    Args:
        source: where they come from.
        marks: those of the metric that Keras resets when it resets the sums.
        over_ranks: a function that adds up the arrays of all ranks.
    """

    def __init__(
        self,
        source: "TrackerSums | LossRecord",
        marks: Marks,
        over_ranks: Callable[[Vector], Vector],
    ) -> None:
        self._source, self._marks, self._over_ranks = source, marks, over_ranks
        self._resets = marks.resets

    def begin(self) -> None:
        """An epoch begins, for which Keras has reset the sums."""
        self._source.clear()
        self._resets = self._marks.resets

    @property
    def is_reset(self) -> bool:
        """Whether the sums were reset since they were last taken, which lost what was new."""
        return self._resets != self._marks.resets

    def take(self, weights: Vector) -> Vector:
        """What is new: a `Segment.sums` of batches with these weights, NaN if it is not known."""
        new = self._source.take(weights)
        if self.is_reset:
            new = np.full_like(new, np.nan)
            self._resets = self._marks.resets
        return self._over_ranks(new)


class TrackerSums:
    """What Keras takes the averages in its logs from: the metrics that it tracks the losses by."""

    def __init__(self, model: keras.Model, names: tuple[str, ...]) -> None:
        self._model, self._names = model, names
        self.clear()

    def clear(self) -> None:
        """Takes them to be zero."""
        self._taken = np.zeros(2 * len(self._names) + 1)

    def take(self, weights: Vector) -> Vector:
        """The `Segment.sums` of the batches since the last call, which had these weights."""
        trackers = {m.name: m for m in self._model.metrics if isinstance(m, keras.metrics.Mean)}
        keys = [f"{name}_loss" for name in self._names]
        # Keras logs the loss of a single output as `loss` alone, weighted.
        is_weighted = len(keys) == 1 and keys[0] not in trackers
        keys = ["loss"] if is_weighted else keys
        if not trackers.keys() >= {"loss", *keys}:
            return np.full_like(self._taken, np.nan)
        variables = [trackers[key].total for key in keys] + [trackers[key].count for key in keys]
        sums = backend.to_host([*variables, trackers["loss"].count])
        with np.errstate(invalid="ignore"):
            new = sums - self._taken
        self._taken = sums
        if is_weighted:
            new[0] /= weights[0] or np.nan  # What it was at weight 0, nothing tells.
        # A step of the user's own may leave `loss` alone.
        new[-1] = new[-1] or new[len(keys)]
        return new
