"""Which weights the batches of an epoch had, and what their losses come to."""

import threading

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


class EpochWeights:
    """The weights that the batches of an epoch have had so far, and the sums of their losses.

    Args:
        weights: those of its first batch: float64, shape `(K,)`.

    Attributes:
        weights: those of the batch under way.
        validation: those that the epoch's validation had; None where there was none.
        is_open: whether a batch has begun, and the epoch not ended.
        begun: the number of the batch that began last.
        sums: of the K unweighted losses over the batches that were added, each times how much its
            batch counts; then of these counts. Shape `(K + 1,)`.
        part: the sums since the window under way, or its part in this epoch, began.
        weighted: of the K losses times the weights that they had, likewise. Shape `(K,)`.
        is_constant: whether all batches had the same weights.
        is_summed: whether the sums are known of all batches.
    """

    def __init__(self, weights: Vector) -> None:
        self.weights = weights
        self.validation: Vector | None = None
        self.is_open = False
        self.is_constant = self.is_summed = True
        self.sums, self.weighted = np.zeros(len(weights) + 1), np.zeros(len(weights))
        self.part = np.zeros(len(weights) + 1)
        # Of the weights, by what the batches count, and by their number.
        self._counted, self._numbered = np.zeros(len(weights)), np.zeros(len(weights))
        self._since = self.begun = 0
        # By thread: where Keras has several call `on_train_batch_end`, each goes in order.
        self._ended: dict[int, int] = {}

    @property
    def batches(self) -> int:
        """How many batches have ended."""
        return max(self._ended.values(), default=0)

    @property
    def has_ended(self) -> bool:
        """Whether any batch has."""
        return bool(self._ended)

    def begin(self, batch: int) -> None:
        """Batch number `batch` begins."""
        if not self.is_open:
            self._since = batch
        self.is_open, self.begun = True, batch

    def end(self, batch: int) -> None:
        """Batch number `batch` has ended."""
        self._ended[threading.get_ident()] = batch + 1

    def add(self, sums: Vector | None, is_weighted: bool = False) -> None:
        """Adds the batches since the last call, which had the present weights.

        Args:
            sums: over these batches, as the attribute; None if they are not known.
            is_weighted: whether the losses are those times their weights, as of a single output.
        """
        batch = max(self.begun, self.batches)
        if sums is None and batch > self._since:
            self.is_summed = False
        if sums is not None and sums[-1] > 0:
            with np.errstate(invalid="ignore"):
                if is_weighted:
                    sums[:-1] /= np.where(self.weights == 0, np.nan, self.weights)
                self.sums += sums
                self.part += sums
                self.weighted += self.weights * sums[:-1]
            self._counted += self.weights * sums[-1]
        self._numbered += (batch - self._since) * self.weights
        self._since = batch

    def change(self, weights: Vector) -> None:
        """The next batch has these weights. Those before that were not added, are by number."""
        if self.is_open and not np.array_equal(weights, self.weights):
            self.is_constant = False
            if max(self.begun, self.batches) > self._since:
                self.add(None)
        self.weights = weights

    def mean(self) -> Vector:
        """The mean of the weights over the batches: float64, shape `(K,)`.

        As far as the sums are known, each batch counts as in its losses.
        """
        if self.is_constant:
            return self.weights
        last = (self.batches - self._since) * self.weights
        mean: Vector = (self._numbered + last) / self.batches
        if self.is_summed and self.sums[-1] > 0:
            mean = self._counted / self.sums[-1]
        return mean
