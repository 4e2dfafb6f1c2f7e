"""Which weights the batches of an epoch had."""

import threading

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


class EpochWeights:
    """The weights that the batches of an epoch have had so far.

    Args:
        weights: those of its first batch: float64, shape `(K,)`.

    Attributes:
        weights: those of the batch under way.
        validation: those that the epoch's validation had; None where there was none.
    """

    def __init__(self, weights: Vector) -> None:
        self.weights = weights
        self.validation: Vector | None = None
        self._sum, self._since, self._begun = np.zeros_like(weights), 0, 0
        # By thread: where Keras has several call `on_train_batch_end`, each goes in order.
        self._ended: dict[int, int] = {}

    @property
    def batches(self) -> int:
        """How many batches have ended."""
        return max(self._ended.values(), default=0)

    @property
    def is_constant(self) -> bool:
        """Whether all batches had the same weights."""
        return self._since == 0

    def begin(self, batch: int) -> None:
        """Batch number `batch` begins."""
        self._begun = batch

    def end(self, batch: int) -> None:
        """Batch number `batch` has ended."""
        self._ended[threading.get_ident()] = batch + 1

    def change(self, weights: Vector) -> None:
        """The next batch has these weights."""
        batch = max(self._begun, self.batches)
        self._sum = self._sum + (batch - self._since) * self.weights
        self.weights, self._since = weights, batch

    def mean(self) -> Vector:
        """The mean of the weights over the batches: float64, shape `(K,)`."""
        if self.is_constant:
            return self.weights
        mean: Vector = (self._sum + (self.batches - self._since) * self.weights) / self.batches
        return mean
