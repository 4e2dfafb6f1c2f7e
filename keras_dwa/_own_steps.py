"""What a model with a step or trackers of its own logs of the terms that its compound loss got."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from keras_dwa._loss_record import averages
from keras_dwa._loss_weights import LossWeights
from keras_dwa._ranks import total_in_fit


class OwnSteps:
    """The logs of the first two steps of an epoch, and what a compound loss recorded in it.

    One step shows a tracker of other values than the unweighted terms, two show values of the last
    batch in the place of averages.

    Args:
        weights: those of the weighting.
        expected: whether the model may log the losses itself.
    """

    def __init__(self, weights: LossWeights, expected: bool = False) -> None:
        self._weights, self.expected = weights, expected
        # Ranks may each log their own.
        self._is_compared = weights.parallel is None
        # By the number of batches up to then. Keras has another thread add to the first.
        self._logged: dict[int, Mapping[str, float]] = {}
        self._recorded: dict[int, NDArray[np.float64]] = {}

    def add_logs(self, batches: int, logs: Mapping[str, float]) -> None:
        """Adds the logs that the epoch has after some batches."""
        if self.expected and self._is_compared and len(self._logged) < 2:
            self._logged[batches] = dict(logs)

    def lacks_record(self, batches: int | None) -> bool:
        """Whether to call `add_record`, for which the variables must have values."""
        is_first = self._is_compared and len(self._recorded) < 2
        return batches is None or is_first

    def add_record(self, batches: int | None) -> None:
        """Adds what was recorded in the epoch, unless other calls than its steps' did.

        Args:
            batches: how many have ended; None where all have.
        """
        sums = self._weights.sums()
        of_batches = round(sums[-1])
        if self._weights.was_reset or batches not in (None, of_batches):
            return
        recorded = averages(total_in_fit(sums, self._weights))
        if recorded is not None:
            self._recorded[of_batches] = recorded

    def check(self) -> None:
        """Raises a ValueError if the logs have other losses than were recorded."""
        before, sums_before = 0, np.zeros(len(self._weights.names))
        for batches, record in sorted(self._recorded.items()):
            if (logs := self._logged.get(batches)) is None:
                continue
            sums = batches * record[1, :-1]
            last = (sums - sums_before) / (batches - before)
            for k, name in enumerate(self._weights.names):
                if (value := logs.get(f"{name}_loss")) is None:
                    continue
                # The average over samples or over batches. Later, it may be a weighted one of which
                # `combine` was not told.
                is_average = np.isclose(value, record[:, k], rtol=1e-2, equal_nan=True).any()
                if not is_average and (before == 0 or np.isclose(value, last[k], rtol=1e-4)):
                    raise ValueError(
                        f"`logs` has {value} for `{name}_loss`, but the compound loss got a term "
                        f"of {record[1, k]} (average of {batches}). Log the average of what "
                        "`combine` gets, unweighted; a factor of its own is a base weight:\n"
                        f"    keras.metrics.Mean(name='{name}_loss')"
                    )
            before, sums_before = batches, sums

    def missing(self, logs: Mapping[str, float], batches: int) -> dict[str, float]:
        """The averages over the batches of an epoch that its logs lack, as far as recorded."""
        if batches not in self._recorded:
            return {}
        by_name = self._weights.by_name(self._recorded[batches][0, :-1])
        return {key: v for name, v in by_name.items() if (key := f"{name}_loss") not in logs}
