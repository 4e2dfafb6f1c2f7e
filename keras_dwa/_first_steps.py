"""Whether a model with trackers of its own logs what its compound loss got."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from keras_dwa._loss_weights import LossWeights


class FirstSteps:
    """What the first two steps of an epoch logged, and what a compound loss recorded in them.

    One step shows a tracker of other values than the unweighted terms, two show values of the last
    batch in the place of averages.

    Args:
        is_needed: whether the model may log the losses by trackers of its own.
    """

    def __init__(self, is_needed: bool = False) -> None:
        self._is_needed = is_needed
        # By the number of batches up to then. Keras has another thread add to the first.
        self._logged: dict[int, Mapping[str, float]] = {}
        self._recorded: dict[int, NDArray[np.float64]] = {}

    def add_logs(self, batches: int, logs: Mapping[str, float]) -> None:
        """Adds the logs that the epoch has after some batches."""
        if self._is_needed and len(self._logged) < 2:
            self._logged[batches] = dict(logs)

    @property
    def lacks_record(self) -> bool:
        """Whether there is something to add to the record."""
        return self._is_needed and len(self._recorded) < 2

    def add_record(self, weights: LossWeights, batches: int | None) -> None:
        """Adds what was recorded in the epoch, if that was in its steps alone.

        Args:
            weights: those of the weighting. On JAX, they must have values.
            batches: how many have ended; None if that may not be known yet.
        """
        recorded = weights.recorded()
        if recorded is None or weights.was_reset:
            return
        of_batches = int(recorded[1, -1])
        if batches in (None, of_batches):
            self._recorded[of_batches] = recorded

    def check(self, names: tuple[str, ...]) -> None:
        """Raises a ValueError if the logs have other losses than were recorded."""
        for batches in self._recorded.keys() & self._logged.keys():
            averages_by_name = zip(names, self._recorded[batches].T[:-1].tolist(), strict=True)
            for name, averages in averages_by_name:
                value = self._logged[batches].get(f"{name}_loss", averages[0])
                # Over samples, or over batches.
                if not np.isclose(value, averages, rtol=1e-2, equal_nan=True).any():
                    raise ValueError(
                        f"`logs` has {value} for `{name}_loss`, but the compound loss got a term "
                        f"of {averages[1]} (average of {batches}). Log the average, unweighted:\n"
                        f"    keras.metrics.Mean(name='{name}_loss')"
                    )
