"""A rule that sets factors by a schedule of the epoch."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_dwa._loss_weighting import LossWeighting
from keras_dwa._wiring import check_no_fit

Schedule = Callable[..., Mapping[str, float] | None]


@keras.saving.register_keras_serializable(package="keras_dwa")
class LossWeightScheduler(LossWeighting):
    """Callback that sets the loss weights by a function of the epoch.

    Like Keras's `LearningRateScheduler`, it calls `schedule` at the start of each epoch, for
    example to anneal a term, to ramp one up, or to train in phases. See `LossWeighting` for what
    the callback logs, what to monitor, and how its state is saved.

    In a custom loop, the weights start with the factors of epoch 0. Each `step` sets those of the
    next epoch.

    Args:
        outputs: Names of the outputs that have a loss, as in `compile(loss={name: ...})`: a
            sequence, or a dict of name to base weight (a finite number > 0; 1 for a sequence).
        schedule: Function `schedule(epoch)` or `schedule(epoch, factors)`. `epoch` counts from 0;
            `factors` is a dict of output name to the previous epoch's factor. It returns a dict of
            output name to factor, a finite number >= 0. Outputs left out keep theirs; `None` keeps
            all. If an epoch starts twice, as when a run resumes within it, `factors` is the same.
        update_freq: `"epoch"`, or a number of batches > 0 (a window). With windows, `schedule` gets
            the number of trained batches divided by `update_freq`, rounded down, as `epoch`.
        verbose: 0 or 1. 1 prints the weights at the start of each epoch.

    Raises:
        ValueError: If an argument, or what `schedule` returns, is invalid.

    Examples:
        >>> from keras_dwa import LossWeightScheduler
        >>> def anneal(epoch):
        ...     return {"kl": min(1.0, epoch / 10)}
        >>> annealing = LossWeightScheduler({"reconstruction": 1.0, "kl": 4.0}, anneal)
        >>> annealing.factors
        {'reconstruction': 1.0, 'kl': 0.0}
        >>> annealing.step()
        {'reconstruction': 1.0, 'kl': 0.4000000059604645}
    """

    _prints_at_begin = True

    def __init__(
        self,
        outputs: Sequence[str] | Mapping[str, float],
        schedule: Schedule,
        update_freq: str | int = "epoch",
        verbose: int = 0,
    ) -> None:
        super().__init__(outputs, update_freq, verbose)
        if not callable(schedule):
            raise ValueError(
                "`schedule` must be a function of the epoch, or of epoch and factors. "
                f"Found `schedule = {schedule!r}`."
            )
        self.schedule = schedule
        self._begin(0)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, as `LossWeighting.get_config`.

        Raises:
            ValueError: If `schedule` is not registered with Keras, so that it could not be loaded.
        """
        schedule = self.schedule
        registered = schedule if inspect.isfunction(schedule) else type(schedule)
        name = keras.saving.get_registered_name(registered)
        can_load = inspect.isfunction(schedule) or hasattr(schedule, "from_config")
        if keras.saving.get_registered_object(name) is not registered or not can_load:
            raise ValueError(
                f"To be saved, `schedule` must be registered. Found {schedule!r}. Write\n"
                "    @keras.saving.register_keras_serializable()\n"
                "above its `def` (or its class, which needs `get_config` and `from_config`)."
            )
        return {**super().get_config(), "schedule": schedule}

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if self._window_size is None:
            self._begin(epoch)
        super().on_epoch_begin(epoch, logs)

    def update(self, epoch: int, logs: Mapping[str, float]) -> Mapping[str, float] | None:
        """Returns the factors for the next window. (Those for an epoch are set when it starts.)"""
        return self._scheduled(epoch + 1) if self._window_size else None

    def assign(self, factors: Mapping[str, float]) -> None:
        super().assign(factors)
        # If the epoch starts again, outputs that the schedule leaves out keep these factors.
        assigned = {name: self.factors[name] for name in factors}
        before = {**self._before(), **assigned}
        self._move("`assign`", lambda: self._remember(self.state.get("epoch", 0), before))

    def step(
        self, losses: Mapping[str, float] | None = None, *, all_ranks: bool = True
    ) -> dict[str, float]:
        """Ends an epoch of a custom loop: sets the factors of the next epoch.

        Args:
            losses: As in `LossWeighting.step`, but never needed.
            all_ranks: As in `LossWeighting.step`.

        Returns:
            Dict of output name to new weight, a float.

        Raises:
            RuntimeError: During `fit`, which does this itself, and as in `LossWeighting.step`.
        """
        check_no_fit(self._run is not None)
        epoch = int(self.state.get("epoch", -1)) + 1
        super().step(losses, all_ranks=all_ranks)
        self._begin(epoch)
        return self._current()

    def reset(self) -> None:
        """Starts again from the first epoch: the factors of epoch 0, no recorded losses.

        Also empties `windows`. Keeps the scale of the base weights that `adapt` found.
        """
        super().reset()
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        source = f"`{type(self).__name__}.schedule` for {self._unit} {epoch + 1}"
        self._move(source, lambda: self._scheduled(epoch))

    def _scheduled(self, epoch: int) -> Any:
        """The factors for an epoch or window. Remembers it, and the factors before, in `state`."""
        before = self._before() if self.state.get("epoch") == epoch else self.factors
        arguments = (epoch, dict(before)) if _takes_factors(self.schedule) else (epoch,)
        found = self.schedule(*arguments)
        self._remember(epoch, before)
        if found is None:
            return before
        return {**before, **found} if isinstance(found, Mapping) else found

    def _before(self) -> dict[str, float]:
        """The factors that the schedule got for the current epoch."""
        if "before" not in self.state:
            return self.factors
        return dict(zip(sorted(self.outputs), self.state["before"].tolist(), strict=True))

    def _remember(self, epoch: int, before: Mapping[str, float]) -> None:
        self.state["epoch"] = np.array(epoch)
        # Sorted, because a loaded file may have the outputs in another order.
        self.state["before"] = np.array([before[name] for name in sorted(before)])


def _takes_factors(schedule: Callable[..., Any]) -> bool:
    """Whether `schedule` takes the factors as its second argument."""
    try:
        parameters = inspect.signature(schedule).parameters.values()
    except ValueError:
        return False  # Some functions written in C have no signature.
    positional = [each for each in parameters if each.kind <= each.POSITIONAL_OR_KEYWORD]
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return True
    # Other parameters with defaults are the user's, such as `n` in `lambda epoch, n=n: ...`.
    return len(positional) > 1 and (
        positional[1].name == "factors" or positional[1].default is inspect.Parameter.empty
    )
