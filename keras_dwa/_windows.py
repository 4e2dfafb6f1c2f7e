"""Windows of batches, as periods of a rule in the place of epochs."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from keras_dwa._compiled import new_sums
from keras_dwa._epoch_weights import Vector
from keras_dwa._rule import Rule


@dataclass(frozen=True)
class Window:
    """A window of batches that is over.

    Attributes:
        batches: how many it had.
        losses: output name to unweighted loss, averaged over them.
        weights: output name to the weight that the last of them had.
    """

    batches: int
    losses: dict[str, float]
    weights: dict[str, float]


class WindowedRule(Rule):
    """A rule that is asked after each window of `update_freq` batches, unless that is "epoch".

    A window goes on from one epoch to the next. What an epoch leaves of it is in `State.window`.
    """

    def __init__(
        self,
        outputs: Sequence[str] | Mapping[str, float],
        update_freq: str | int = "epoch",
        verbose: int = 0,
    ) -> None:
        super().__init__(outputs, update_freq, verbose)
        self._windows: deque[Window] = deque(maxlen=1000)
        self._begin_epoch()

    def reset(self) -> None:
        self._add_sums()
        super().reset()
        self._windows.clear()
        self._open_window(self._weights.epoch.begun)

    def _add_sums(self) -> None:
        epoch = self._weights.epoch
        was_summed = epoch.is_summed
        super()._add_sums()
        if was_summed and not epoch.is_summed and self._update_freq != "epoch":
            self._messages.append(
                "does not know the losses of some batches of the epoch: an evaluation took their "
                "place. In `callbacks`, list the weighting before those that evaluate."
            )

    def _begin_epoch(self) -> None:
        """The window under way goes on in a new epoch."""
        self._completed = -1
        self._open_window(0)

    def _open_window(self, batches: int) -> None:
        """The window under way, or its part in this epoch, begins after so many batches of it."""
        self._opened, self._weights.epoch.part = batches, np.zeros(len(self.outputs) + 1)

    def _begin_first_batch(self, batch: int) -> None:
        self._open_window(batch)
        if self._weights.lost and self._update_freq != "epoch":
            # Other calls since Keras began the epoch: what there is, is not of its batches.
            self._sync()
            new_sums(self.model, self._weights)

    @property
    def windows(self) -> list[Window]:
        """The windows of batches that are over, the latest 1000, oldest first."""
        return list(self._windows)

    def _is_over(self, batches: int) -> bool:
        """Whether the window under way is, after so many batches of the epoch."""
        if self._update_freq == "epoch":
            return False
        had = float(self._weights.state.window[-1])
        return bool(had + batches - self._opened >= self._update_freq)

    def _window(self, batches: int) -> Vector:
        """What `State.window` would be after so many batches of the epoch."""
        part = np.append(self._weights.epoch.part, max(0, batches - self._opened))
        window: Vector = self._weights.state.window + part
        return window

    def _close_window(self, batches: int) -> None:
        weights, state = self._weights, self._weights.state
        *sums, count, of_batches = self._window(batches)
        losses = weights.by_name(np.array(sums) / (count or np.nan))
        closed = Window(int(of_batches), losses, weights.by_name(weights.epoch.weights))
        logs = {f"{name}_loss": loss for name, loss in losses.items()}
        window, periods = np.zeros_like(state.window), state.periods + 1
        self._close_period(state.periods, logs, False, periods=periods, window=window)
        self._windows.append(closed)
        weights.fold()
        self._open_window(batches)

    def _complete_sums(self) -> None:
        """Adds the last batches of an epoch to the sums."""
        weights, epoch = self._weights, self._weights.epoch
        is_needed = self._update_freq != "epoch" or not epoch.is_constant
        if not epoch.is_open or not is_needed or self._completed == epoch.begun:
            return
        self._completed = epoch.begun
        if self._update_freq != "epoch":
            self._sync()
            weights.restore()
        self._add_sums()

    def _end_epoch(self, epoch: int) -> None:
        weights, begun = self._weights, self._weights.epoch.begun
        # Keras 3.10 gives the end of a call of several steps the number of its first; in 3.15, one
        # that is not full has those, too, that it lacks. One may have begun without data.
        has_ended = weights.epoch.batches > begun
        batches = begun + self.model.steps_per_execution if has_ended else begun
        steps = (self.params or {}).get("steps")
        batches = batches if steps is None else min(batches, steps)
        if self._is_over(batches):
            self._close_window(batches)
            window = weights.state.window
        else:
            window = self._window(batches)
        weights.state = replace(weights.state, window=window, epochs=epoch + 1)
