"""What moves the loss weights: a rule when an epoch closes, or the user at any time."""

import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Self

import keras
import numpy as np

from keras_dwa._arguments import (
    check_factors,
    check_losses,
    check_memory,
    check_outputs,
    check_update_freq,
)
from keras_dwa._compiled import new_sums
from keras_dwa._loss_record import averages
from keras_dwa._loss_weights import LossWeight, LossWeights
from keras_dwa._ranks import same_on_ranks, total_of_ranks
from keras_dwa._wiring import check_no_fit, put_back


class BoundCallback(keras.callbacks.Callback):
    """A callback whose variables a model was compiled with: never copied, pickled without it."""

    _weights: LossWeights

    def __init__(self) -> None:
        super().__init__()
        # The thread of the `fit` under way.
        self._thread: int | None = None
        # All models that were shown.
        self._models: list[weakref.ref[keras.Model]] = []
        # What to warn of once all is done, for a warning may be an error.
        self._messages: list[str] = []

    def __repr__(self) -> str:
        return self._shown()

    def _shown(self, **arguments: Any) -> str:
        weights = self._weights
        base_weights = weights.by_name(weights.base_weights)
        outputs = base_weights if (weights.base_weights != 1).any() else list(weights.names)
        current = weights.by_name(weights.assigned)
        arguments["weights"] = {name: float(f"{weight:.4g}") for name, weight in current.items()}
        shown = ", ".join(f"{name}={value}" for name, value in arguments.items())
        return f"{type(self).__name__}({outputs}, {shown})"

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        # KerasTuner copies its callbacks for every trial, but not the weights that the model has.
        return self

    __copy__ = __deepcopy__

    def __getstate__(self) -> dict[str, Any]:
        self._sync()
        return {**self.__dict__, "_model": None, "_wrapper": None, "_models": [], "_thread": None}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**keras.saving.deserialize_keras_object(config))

    def _knows(self, model: keras.Model) -> bool:
        return any(known() is model for known in self._models)

    def _sync(self) -> None:
        # On JAX, a model's variables have no value while an epoch runs, other than within its step;
        # `Callback.model` puts them back, and the next step takes them from there.
        try:
            self._weights.vector.value  # noqa: B018
        except RuntimeError:
            self.model  # noqa: B018

    def _add_sums(self) -> None:
        """Adds the batches of the epoch under way so far, if any, to the sums of their losses."""
        if self._weights.epoch.is_open:
            self._sync()
            self._weights.epoch.add(*new_sums(self.model, self._weights))

    def _warn(self) -> None:
        messages, self._messages = self._messages, []
        if len(messages) > 5:
            messages[5:] = [f"has {len(messages) - 5} more messages of this epoch."]
        if messages:
            name = type(self).__name__
            warnings.warn("\n".join(f"{name} {message}" for message in messages), stacklevel=3)


class Rule(BoundCallback):
    """Live loss weights by output name, and how they move; `LossWeighting` says when in `fit`."""

    def __init__(
        self,
        outputs: Sequence[str] | Mapping[str, float],
        update_freq: str | int = "epoch",
        verbose: int = 0,
    ) -> None:
        super().__init__()
        self._update_freq: Any = check_update_freq(update_freq)
        self._unit = "epoch" if self._update_freq == "epoch" else "window"
        self.verbose = verbose
        rules = [cls.__name__ for cls in type(self).__mro__]
        self._weights = LossWeights(check_outputs(outputs), rules, self._update_freq != "epoch")
        # The factors assigned since the last epoch or `fit` ended, with which a new model begins.
        self._assigned: dict[str, float] = {}
        # The memory while `update` runs, so that an error in it leaves the former one.
        self._draft: dict[str, Any] | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs, as given."""
        return self._weights.names

    @property
    def base_weights(self) -> Mapping[str, float]:
        """The base weights by output name, which stay as they are."""
        return MappingProxyType(self._weights.by_name(self._weights.base_weights))

    @property
    def factors(self) -> dict[str, float]:
        """What the base weights are multiplied by, by output name, in a new dict."""
        return self._weights.by_name(self._weights.state.factors)

    @property
    def loss_weights(self) -> dict[str, LossWeight]:
        """The live weights by output name, in a new dict: for `compile(loss_weights=...)`."""
        self._sync()
        return dict(self._weights.entries)

    @property
    def state(self) -> Any:
        """What the rule remembers, name to array: empty at first, stored with the weights.

        Only `update` may put something in.
        """
        memory = self._weights.state.memory
        return MappingProxyType(memory) if self._draft is None else self._draft

    @property
    def variables(self) -> list[keras.Variable]:
        """The weights, and what a `CompoundLoss` records: the state for its `stateless_call`."""
        self._sync()
        return list(self._weights.variables)

    def assign(self, factors: Mapping[str, float]) -> None:
        """Sets factors by output name; the next step uses them.

        Call it before `fit`; in `on_epoch_begin`, `on_train_batch_begin` or `on_epoch_end` of
        another callback, listed after this one and before those that write files; or in a loop of
        your own (if that calls `train_on_batch`, call `set_model(model)` before it).

        Args:
            factors: output name to factor, a finite number >= 0; names left out keep theirs. 0
                switches a loss off until another factor is assigned.

        Raises:
            ValueError: if a name is not an output's, or a factor not as described.
            RuntimeError: if called in another thread than that of the `fit` under way, as Keras
                calls `on_train_batch_end` beside the next steps.
        """
        if self._thread not in (None, threading.get_ident()):
            raise RuntimeError(
                "`assign` was called beside the steps of `fit`, in another thread. Call it in "
                "`on_epoch_begin`, `on_train_batch_begin` or `on_epoch_end`; if that `fit` broke "
                "off, call `weighting.on_train_end()`."
            )
        self._sync()
        new = check_factors(factors, self.factors, self._weights, "`assign`")
        self._add_sums()
        self._weights.replace(replace(self._weights.state, factors=new))
        self._assigned.update({name: self.factors[name] for name in factors})

    def update(self, epoch: int, logs: Mapping[str, float]) -> Mapping[str, float] | None:
        """The factors of the next epoch: the method to override. By itself it moves nothing.

        What it puts into `self.state` is kept if it returns, and dropped if it raises.

        Args:
            epoch: the epoch that ends, from 0; with `update_freq` in batches, the window.
            logs: `<name>_loss` for each output, its unweighted loss averaged over the epoch or
                window; after an epoch of `fit`, all else that its logs have, `val_<name>_loss` and
                metrics, too.

        Returns:
            Output name to factor, a finite number >= 0; names left out keep theirs. None if all do.
        """
        return None

    def step(
        self, losses: Mapping[str, float] | None = None, *, all_ranks: bool = True
    ) -> dict[str, float]:
        """Closes an epoch: moves the weights by the averages of its losses.

        `on_epoch_end` does the same; call it yourself only in a loop without `fit`. If that loop
        calls `train_on_batch`, call `set_model(model)` before it, as `fit` does: the model then
        hands the weights to its compiled step. Call `step` before `evaluate`, which records, too.

        In a process group of torch's, as for `DistributedDataParallel`, every rank must call it:
        the averages are those over all ranks, in one all-reduce, and so all have the same weights.

        Args:
            losses: output name to the unweighted loss averaged over the epoch, a scalar each; over
                all ranks, the same on each. Without it, the averages that a `CompoundLoss` recorded
                since the last `step`; where there are none, nothing happens.
            all_ranks: False for ranks that train different models: nothing of the others counts.

        Returns:
            The weights by output name, as floats.

        Raises:
            ValueError: if `losses` has other names than `outputs`, or a value is not a scalar.
            RuntimeError: if it would close an epoch of a `fit` that trains by a `CompoundLoss`; if
                only some ranks recorded anything, or their factors, epochs or `losses` differ.
        """
        self._sync()
        weights = self._weights
        if losses is None:
            if weights.in_logs:
                check_no_fit(self._thread)
            sums = weights.sums()
            recorded = averages(total_of_ranks(sums, weights) if all_ranks else sums)
            values = None if recorded is None else recorded[0, :-1]
            if values is None and weights.called:
                weights.called = False
                self._messages.append(
                    "found nothing recorded, but the compound loss was called. Under "
                    "`jax.jit`, assign what `stateless_call` returns to `weighting.variables`; "
                    "before `train_on_batch`, call `weighting.set_model(model)`."
                )
        else:
            given = check_losses(losses, weights.names)
            values = same_on_ranks(given, weights) if all_ranks else given
        if values is not None:
            if weights.vector.is_frozen:
                weights.vector.is_frozen = False
                self._messages.append(
                    "moves weights that JAX compiled into a step as constants. Before the model's "
                    "first step, call `weighting.set_model(model)`, or pass the callback to `fit`."
                )
            logs = {f"{name}_loss": value for name, value in weights.by_name(values).items()}
            counter = "epochs" if self._update_freq == "epoch" else "periods"
            period = getattr(weights.state, counter)
            self._close_period(period, logs, forget_record=True, **{counter: period + 1})
        self._warn()
        return weights.by_name(weights.assigned)

    def reset(self) -> None:
        """Goes back to the first epoch: the base weights, an empty `state`, nothing recorded."""
        self._sync()
        self._weights.reset()
        self._assigned = {}

    def get_config(self) -> dict[str, Any]:
        """What makes the same weighting anew, for Keras to save; the model's weights have the rest.

        A rule with arguments of its own adds them, and is registered by
        `keras.saving.register_keras_serializable`.
        """
        config = {"outputs": dict(self.base_weights), "verbose": self.verbose}
        windows = {} if self._update_freq == "epoch" else {"update_freq": self._update_freq}
        return {**config, **windows}

    def _close_period(
        self, period: int, logs: Mapping[str, float], forget_record: bool, **changes: Any
    ) -> None:
        """Asks the rule after a period, counted from 0; `changes` are others of the state."""
        weights = self._weights
        self._messages += put_back(weights)
        source = f"`{type(self).__name__}.update` after {self._unit} {period + 1}"
        try:
            # Copies, for a rule may change an array in place.
            self._draft = {name: np.array(value) for name, value in weights.state.memory.items()}
            found = self.update(period, logs)
            new = check_factors({} if found is None else found, self.factors, weights, source)
            memory = check_memory(self._draft, source)
            state = replace(weights.state, factors=new, memory=memory, **changes)
            weights.replace(state, forget_record)
            self._assigned = {}
        finally:
            self._draft = None
