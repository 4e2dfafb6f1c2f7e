"""The weights and loss sums of the batches of an epoch. Pure NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Segment:
    """Consecutive batches of an epoch that had the same weights.

    Attributes:
        weights: the weights: float64, shape `(K,)`.
        end: the number of batches from the start of the epoch to the end of the segment.
        sums: the sums of the K losses, each loss multiplied by its count in a batch; the K counts
            (outputs can differ in their first axis); and the count of the total loss. NaN if
            unknown. Shape `(2K + 1,)`.
    """

    weights: Vector
    end: int
    sums: Vector


Ledger = Sequence[Segment]


def averages(sums: Vector) -> Vector:
    """The K averages of `Segment.sums`: NaN if nothing was counted."""
    losses, counts = np.split(sums[: len(sums) // 2 * 2], 2)
    return np.asarray(losses / np.where(counts > 0, counts, np.nan))


def repeat_count(sums: Vector) -> Vector:
    """Sums of K losses and their common count, as `Segment.sums`."""
    return np.append(sums[:-1], np.full(len(sums), sums[-1]))


def total(ledger: Ledger) -> Vector:
    """The sums over all segments."""
    sums: Vector = np.sum([segment.sums for segment in ledger], axis=0)
    return sums


def is_known(ledger: Ledger) -> bool:
    """Whether the sums of all segments are known, and something was counted."""
    return bool(total(ledger)[-1] > 0)


def is_constant(ledger: Ledger) -> bool:
    """Whether all batches had the same weights."""
    return all(np.array_equal(segment.weights, ledger[0].weights) for segment in ledger)


def mean_weights(ledger: Ledger) -> Vector:
    """The mean weights. Shape `(K,)`.

    Batches count as in the total loss, or the same if these counts are unknown.
    """
    if is_constant(ledger):
        return ledger[0].weights
    batches = np.diff([segment.end for segment in ledger], prepend=0)
    counts = [segment.sums[-1] for segment in ledger] if is_known(ledger) else batches
    return np.average([segment.weights for segment in ledger], axis=0, weights=counts)


def weights_of_batch(ledger: Ledger, batch: int, current: Vector) -> Vector:
    """The weights of a batch, by its index in the epoch; `current` if it is in no segment yet."""
    weights = current
    for segment in reversed(ledger):
        if segment.end <= batch:
            break
        weights = segment.weights
    return weights


def loss_parts(ledger: Ledger, losses: Vector, weights: Vector | None = None) -> Vector:
    """What each loss adds to the average of the total loss. Shape `(K,)`.

    Args:
        ledger: the segments of the epoch.
        losses: the averages of the K losses over the epoch.
        weights: the weights of the losses; by default, those of the segments.
    """
    if is_constant(ledger) or not is_known(ledger):
        return losses * (mean_weights(ledger) if weights is None else weights)
    counted = [segment for segment in ledger if segment.sums[-1] > 0]
    parts = [
        averages(segment.sums) * (segment.weights if weights is None else weights)
        for segment in counted
    ]
    return np.average(parts, axis=0, weights=[segment.sums[-1] for segment in counted])
