"""What the callback remembers during one run of `fit`."""

import math
import threading
from typing import Any

import keras
import numpy as np

from keras_dwa._ledger import Segment, Vector
from keras_dwa._loss_record import LossRecord
from keras_dwa._loss_weights import LossWeights
from keras_dwa._ranks import total_in_fit
from keras_dwa._sums import TrackerSums


class Run:
    """One run of `fit`, or of a custom loop that calls the callback's hooks.

    Args:
        model: the model that is trained.
        params: the `params` that `fit` passes to callbacks.
        weights: the callback's weights.
        by_record: whether a compound loss records the losses.
        parallel: the `DistributedDataParallel` in which the model trains, if any.
        moves_within: whether the weights move within epochs by themselves.

    Attributes:
        thread: the thread of the run.
        begins_window: whether the run starts with a new window.
        moves_within: whether the weights move within epochs, or have done so once.
        next: the next batch before which the callback has something to do; 0 until one begins.
        is_checked: whether the losses of the first batches were checked.
        has_logs: whether the logs of a batch were checked.
        begun: the batch that began last; 0 before the first of an epoch.
        ledger: the segments of the epoch so far.
        validation: the weights and recorded averages of the epoch's validation, if any.
    """

    def __init__(
        self,
        model: keras.Model,
        params: Any,
        weights: LossWeights,
        by_record: bool,
        parallel: Any,
        moves_within: bool,
    ) -> None:
        self.thread = threading.get_ident()
        self.by_record, self.parallel, self.moves_within = by_record, parallel, moves_within
        self.begins_window = weights.state.window[-1] == 0
        self._weights = weights
        self._sums: TrackerSums | LossRecord = (
            weights.start_recording() if by_record else TrackerSums(model, weights.names)
        )
        self._resets = weights.marks.resets
        self._steps_per_execution = model.steps_per_execution
        # Read now, because `evaluate(callbacks=...)` replaces `params`.
        self._steps = (params or {}).get("steps") or math.inf
        self.is_checked = self.has_logs = False
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.next: float = 0
        self.begun = 0
        self._ended = -1
        self.ledger: list[Segment] = []
        # How many batches of the epoch were read; where the open window begins in the ledger.
        self._read = self._window = 0
        self.validation: tuple[Vector, Vector | None] | None = None

    def begin_sums(self) -> None:
        """Starts the sums of the losses from zero, as Keras does at the start of an epoch."""
        self._sums.clear()
        self._resets = self._weights.marks.resets

    @property
    def is_reset(self) -> bool:
        """Whether the sums were reset since `take_sums`, so that new ones are lost."""
        return self._resets != self._weights.marks.resets

    def take_sums(self) -> Vector:
        """The `Segment.sums` of the batches since the last call, over all ranks. NaN if unknown."""
        new = self._sums.take(self._weights.vector.current)
        if self.is_reset:
            new = np.full_like(new, np.nan)
            self._resets = self._weights.marks.resets
        return total_in_fit(new, self._weights, self.parallel)

    def end_batch(self, batch: int) -> None:
        """Notes that a batch has ended. Ignores late calls from an earlier `fit`."""
        if self.begun <= batch < self.begun + self._steps_per_execution:
            self._ended = batch

    @property
    def batches(self) -> int:
        """How many batches of the epoch are done. Valid when Keras has waited for their ends."""
        if self._ended < self.begun:
            return self.begun
        # With several steps per execution, Keras 3.10 reports the first batch of a call as its end,
        # and Keras 3.15 counts batches that an incomplete call lacks.
        return int(min(self.begun + self._steps_per_execution, self._steps))

    @property
    def in_ledger(self) -> int:
        """How many batches of the epoch are in the ledger."""
        return self.ledger[-1].end if self.ledger else 0

    def add_segment(self, end: int | None = None) -> bool:
        """Adds the batches that are not in the ledger yet. They had the current weights.

        Args:
            end: the number of batches from the start of the epoch to the last of them. None if
                Keras has not waited for their ends, and the number may be off by one: they then
                count with the next segment.

        Returns:
            Whether a reset lost their losses.
        """
        is_reset, new = self.is_reset, self.take_sums()
        begun = self.begun + self._steps_per_execution if end is None else end
        is_lost = is_reset and begun > self._read
        if is_reset and not is_lost:
            new = np.zeros_like(new)
        self._read = begun
        end = self.in_ledger if end is None else end
        self.ledger.append(Segment(self._weights.vector.current, end, new))
        return is_lost

    def begin_window(self) -> None:
        self._window = len(self.ledger)

    def in_window(self, batches: int) -> int:
        """How many of the first `batches` of the epoch are in the open window."""
        return batches - (self.ledger[self._window - 1].end if self._window else 0)

    def window(self, before: Vector) -> Vector:
        """`State.window`: the batches of earlier epochs (`before`) and of the ledger."""
        sums = [segment.sums[:-1] for segment in self.ledger[self._window :]]
        known = sum((new for new in sums if np.isfinite(new[-1])), before[:-1])
        return np.append(known, before[-1] + self.in_window(self.in_ledger))
