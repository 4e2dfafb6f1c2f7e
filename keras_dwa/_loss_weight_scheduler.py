"""A schedule, as a rule for the loss weights: factors that follow the epoch."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from keras_dwa._arguments import check_factors
from keras_dwa._epoch_weights import Vector
from keras_dwa._logs import print_weights
from keras_dwa._loss_weighting import LossWeighting
from keras_dwa._wiring import check_no_fit

Schedule = Callable[[int, dict[str, float]], Mapping[str, float] | None]


@keras.saving.register_keras_serializable(package="keras_dwa")
class LossWeightScheduler(LossWeighting):
    """Moves the loss weights by a function of the epoch, like Keras's `LearningRateScheduler`.

    It is called at the start of each epoch for the factors of that epoch: to anneal a term, to ramp
    one up, to train in phases. See `LossWeighting` for what the callback logs, what to monitor, and
    how its state is saved.

    In a loop without `fit`, the factors of epoch 0 hold from the start, and `step` goes on to those
    of the next epoch.

    Args:
        outputs: the names of the outputs that have a loss, as in `compile(loss={name: ...})`: a
            sequence, or a dict of name to base weight (a finite number > 0; 1 in a sequence).
        schedule: a function of the epoch, from 0, and of the factors of the epoch before, a dict of
            floats by output name. It returns output name to factor, a finite number >= 0; names
            left out keep theirs. None if all do. Where an epoch begins twice, as after a resume
            within it, it gets the same factors again.
        update_freq: "epoch", or a number of batches > 0: `schedule` then gets the number of windows
            of that many batches that are over, in the place of the epoch.
        verbose: 0 or 1. 1 prints the weights at the start of each epoch.

    Raises:
        ValueError: if a name, a base weight or `update_freq` is not as described, if `schedule`
            cannot be called, or if it returns anything else.

    Examples:
        >>> from keras_dwa import LossWeightScheduler
        >>> def anneal(epoch, factors):
        ...     return {"kl": min(1.0, epoch / 10)}
        >>> annealing = LossWeightScheduler({"reconstruction": 1.0, "kl": 4.0}, anneal)
        >>> annealing.factors
        {'reconstruction': 1.0, 'kl': 0.0}
        >>> annealing.step()
        {'reconstruction': 1.0, 'kl': 0.4000000059604645}
    """

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
                "`schedule` must be a function of epoch and factors. "
                f"Found `schedule = {schedule!r}`."
            )
        self.schedule = schedule
        self._begin(0)

    def get_config(self) -> dict[str, Any]:
        """As in `LossWeighting.get_config`; a ValueError if Keras could not load `schedule`."""
        schedule = self.schedule
        registered = schedule if inspect.isfunction(schedule) else type(schedule)
        name = keras.saving.get_registered_name(registered)
        if keras.saving.get_registered_object(name) is not registered:
            raise ValueError(
                f"Keras saves a `schedule` that is registered. Found {schedule!r}. Write\n"
                "    @keras.saving.register_keras_serializable()\n"
                "before its `def` (or its class, which needs a `get_config`)."
            )
        return {**super().get_config(), "schedule": schedule}

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._is_new = False  # A schedule misses no epoch before.
        super().on_epoch_begin(epoch, logs)
        if self._update_freq == "epoch":
            self._begin(epoch)
        if self.verbose > 0:
            print_weights(type(self).__name__, self._weights, epoch)

    def _close_window(self, batches: int) -> None:
        super()._close_window(batches)
        self._begin(self._weights.state.periods)

    def assign(self, factors: Mapping[str, float]) -> None:
        super().assign(factors)
        # Where the epoch begins again, what the schedule leaves out stays as assigned.
        assigned = {name: self.factors[name] for name in factors}
        self._keep(self.state.get("epoch", 0), {**self._before(), **assigned})

    def step(
        self, losses: Mapping[str, float] | None = None, *, all_ranks: bool = True
    ) -> dict[str, float]:
        """Closes an epoch, and goes on to the factors of the next.

        Args:
            losses: as in `LossWeighting.step`. The schedule needs none.
            all_ranks: as in `LossWeighting.step`.

        Returns:
            The weights by output name, as floats.

        Raises:
            RuntimeError: within `fit`, which does it itself; and as in `LossWeighting.step`.
        """
        check_no_fit(self._thread)
        super().step(losses, all_ranks=all_ranks)
        self._begin(int(self.state.get("epoch", -1)) + 1)
        return self._weights.by_name(self._weights.assigned)

    def reset(self) -> None:
        super().reset()
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        before = self._before() if self.state.get("epoch") == epoch else self.factors
        found = self.schedule(epoch, dict(before))
        source = f"`{type(self).__name__}.schedule` for {self._unit} {epoch + 1}"
        new = check_factors({} if found is None else found, before, self._weights, source)
        self._keep(epoch, before, new)

    def _before(self) -> dict[str, float]:
        """The factors that the schedule got for the epoch that began last."""
        if "before" not in self.state:
            return self.factors
        return dict(zip(sorted(self.outputs), self.state["before"].tolist(), strict=True))

    def _keep(self, epoch: int, before: dict[str, float], factors: Vector | None = None) -> None:
        state = self._weights.state
        # In an order of their own, for a file may have the outputs in another one.
        in_order = np.array([before[name] for name in sorted(before)])
        memory = {**state.memory, "epoch": np.array(epoch), "before": in_order}
        factors = state.factors if factors is None else factors
        self._weights.replace(replace(state, factors=factors, memory=memory))
