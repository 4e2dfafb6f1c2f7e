"""The base callback: it moves the loss weights of a model while it trains."""

import math
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Self, cast

import keras
import numpy as np

from keras_dwa import _arguments, _logs, _ranks, _wiring
from keras_dwa._compiled import fixed_part, known_rest
from keras_dwa._evaluation import evaluated_sums
from keras_dwa._formula import scaled_weights
from keras_dwa._ledger import (
    Ledger,
    Segment,
    Vector,
    averages,
    is_constant,
    is_known,
    loss_parts,
    mean_weights,
    repeat_count,
    total,
    weights_of_batch,
)
from keras_dwa._loss_weights import LossWeight, LossWeights, State
from keras_dwa._run import Run


@dataclass(frozen=True)
class Window:
    """A completed window of batches, as listed in `LossWeighting.windows`.

    Attributes:
        batches: The number of batches.
        losses: Dict of output name to unweighted loss, averaged over the window.
        weights: Dict of output name to the weight in the window's last batch.
    """

    batches: int
    losses: dict[str, float]
    weights: dict[str, float]


@keras.saving.register_keras_serializable(package="keras_dwa")
class LossWeighting(keras.callbacks.Callback):
    """Callback that moves the loss weights of a model while it trains.

    The weight of an output is its base weight times its factor. Base weights say how much each loss
    should count in the end. Factors start at 1, and are what moves. Compile the model with
    `loss_weights=weighting.loss_weights` and pass the callback to `fit`. The compiled step reads
    the weights from variables, so Keras does not trace it again when they move.

    By itself, `LossWeighting` moves nothing. Set factors with `assign`, or override `update`, which
    gets the logs of each epoch and returns the factors for the next.

    At the end of each epoch, the callback adds to `logs`:

    - `<name>_weight`: the weight in the epoch, so that `loss` is the sum of
      `<name>_weight * <name>_loss`, plus regularization. If it moved during the epoch, its mean
      over the batches, each counted as in `loss`.
    - `base_loss` and `val_base_loss`: the total loss under the base weights. Monitor these: unlike
      `val_loss`, they do not change when the weights move. (In a TensorFlow graph, Keras averages
      each output's loss over batches, and `base_loss` does the same.)

    If weights move within an epoch, the logs of each batch also have its `<name>_weight`. Put
    callbacks that read these keys after this one.

    A second `fit` of the same model continues from the current weights. A new model starts from the
    first epoch, with the factors that you assigned since the last trained epoch. Use one callback
    for one model at a time.

    `save_weights`, `ModelCheckpoint` and `BackupAndRestore` save factors and `state` with the
    model. A pickled callback keeps them without the model. Once unpickled, it continues with the
    first model that it gets. `copy.copy` and `copy.deepcopy` return the callback itself, because
    the model reads this callback's variables.

    Args:
        outputs: Names of the outputs that have a loss, as in `compile(loss={name: ...})`: a
            sequence, or a dict of name to base weight (a finite number > 0; 1 for a sequence). A
            nested output goes by its path, such as `"heads/depth"`.
        update_freq: `"epoch"`, or a number of batches > 0 (a window): how often `fit` calls
            `update`. With windows, `update` gets the index of the completed window, from 0, and
            only its losses. A window can continue in the next epoch.
        verbose: 0 or 1. 1 prints the weights that `update` sets at the end of each epoch, and the
            base weights that `adapt` sets.

    Raises:
        ValueError: If an argument is invalid. `fit` raises it before the first step if the model
            was not compiled with these weights, within two steps if the logs lack `<name>_loss`,
            and at the end of an epoch if the weights have moved but the loss ignores them.
        RuntimeError: From `fit`, if another `fit` uses the callback at the same time, or the
            callback has no model.

    Examples:
        >>> import keras, numpy as np
        >>> from keras_dwa import LossWeighting
        >>> class HalveTheLarger(LossWeighting):
        ...     def update(self, epoch, logs):
        ...         larger = max(self.outputs, key=lambda name: logs[f"{name}_loss"])
        ...         return {larger: 0.5 * self.factors[larger]}
        >>> inputs = keras.Input((4,))
        >>> depth = keras.layers.Dense(1)(inputs)
        >>> normals = keras.layers.Dense(3)(inputs)
        >>> model = keras.Model(inputs, {"depth": depth, "normals": normals})
        >>> weighting = HalveTheLarger(["depth", "normals"])
        >>> model.compile(
        ...     optimizer="sgd",
        ...     loss={"depth": "mae", "normals": "mse"},
        ...     loss_weights=weighting.loss_weights,
        ... )
        >>> x = np.ones((8, 4))
        >>> y = {"depth": np.full((8, 1), 100.0), "normals": np.ones((8, 3))}
        >>> history = model.fit(x, y, epochs=3, verbose=0, callbacks=[weighting])
        >>> history.history["depth_weight"]
        [1.0, 0.5, 0.25]
    """

    # Keras then calls `on_train_batch_end` in another thread, without waiting for it.
    async_safe = True
    # Whether `verbose=1` prints the weights as an epoch begins, rather than after `update`.
    _prints_at_begin = False

    def __init__(
        self,
        outputs: Sequence[str] | Mapping[str, float],
        update_freq: str | int = "epoch",
        verbose: int = 0,
    ) -> None:
        super().__init__()
        freq = _arguments.check_update_freq(update_freq)
        # In batches. None without windows.
        self._window_size: int | None = None if freq == "epoch" else int(freq)
        self.verbose = verbose
        rules = [cls.__name__ for cls in type(self).__mro__]
        self._weights = LossWeights(_arguments.check_outputs(outputs), rules)
        self._weights.before_change = self._before_change
        self._run: Run | None = None
        # The latest completed windows.
        self._windows: deque[Window] = deque(maxlen=1000)
        # The factors assigned since the last epoch or `fit` ended. A new model starts with them.
        self._assigned: dict[str, float] = {}
        # What `update` writes to, so that its changes are dropped if it raises an error.
        self._draft: dict[str, Any] | None = None
        # Whether the loss has always been the sum under the base weights, under the base weights as
        # given, and under none.
        self._static = np.ones(3, dtype=bool)
        # torch's `DistributedDataParallel`, if the model came wrapped in it.
        self._wrapper: Any = None
        # Warned of at the end of a hook, because warnings can be turned into errors.
        self._messages: list[str] = []

    # The hooks, in the order in which Keras calls them.

    def set_model(self, model: keras.Model) -> None:
        """Connects the callback to a model, as `fit` does. Call it before a `train_on_batch` loop.

        Args:
            model: A model compiled with these loss weights.

        Raises:
            ValueError: If `fit` would refuse the model.
        """
        weights = self._weights
        plain = keras.callbacks.Callback()
        plain.set_model(model)
        # Keras unwraps torch's `DistributedDataParallel`.
        wrapper, model = model, plain.model
        _wiring.check_model(model, weights, in_fit=False)
        self._wrapper = None if wrapper is model else wrapper
        compiled_loss, logged = model.loss, _wiring.logged_by_record(model, weights)
        weights.marks.logged = lambda: logged if model.loss is compiled_loss else ()
        former = self.model
        if model is former and _wiring.is_tracked(model, weights):
            return
        returns = former is not None and getattr(model, weights.name, None) is weights
        # By unpickling, or by Keras for a model with a compound loss.
        is_loaded = former is None and weights.is_loaded
        self._run = None
        _wiring.attach(model, weights)
        if not is_loaded:
            assigned = self._assigned
            self.reset()
            if assigned:
                self.assign(assigned)
        # Last, so that the next call starts over if Ctrl-C interrupts this one.
        super().set_model(model)
        if returns:
            self._messages.append(
                "was used with another model in between, so it starts again from the first epoch. "
                "Make one weighting per model:\n"
                "    other_model.compile(..., loss_weights=other_weighting.loss_weights)"
            )
            self._warn()

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        model, weights = self.model, self._weights
        _wiring.check_attached(model, weights, self)
        _wiring.check_model(model, weights)
        by_record = _wiring.records(model, weights)
        # Since Keras 3.16, `fit` itself wraps the model if there are several ranks.
        parallel = self._wrapper or getattr(model, "ddp_model", None)
        has_windows = self._window_size is not None
        self._run = Run(model, self.params, weights, by_record, parallel, moves_within=has_windows)

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        run, weights = self._this_run(), self._weights
        weights.vector.restore()
        is_late = epoch > weights.state.periods and not self._window_size
        if weights.is_loaded and is_late and not run.is_checked:
            self._messages.append(
                f"continues with epoch {epoch + 1}, but the file it was loaded from has seen only "
                f"{weights.state.periods} of the epochs before. List the callback that writes the "
                "file last:\n"
                "    callbacks=[weighting, keras.callbacks.BackupAndRestore(...)]"
            )
        weights.is_loaded = False
        run.begin_epoch()
        run.begin_sums()
        if self._window_size:
            run.take_sums()  # Drops what an evaluation added since the reset.
        if self.verbose and self._prints_at_begin:
            _logs.print_weights(type(self).__name__, self._current(), epoch)
        self._warn()

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        run = self._run
        if run is None:
            return
        run.begun = batch
        if batch < run.next:
            return
        if batch == 0 and run.is_reset:
            # By another callback's `on_epoch_begin`.
            self._sync()
            run.take_sums()
        if batch > 0:
            self._check_first_batches()
        run.next = batch + 1 if not run.is_checked else math.inf
        if size := self._window_size:
            trained = self._trained(batch)
            if self._ends_window(trained, size):
                self._close_segment()
                self._close_window()
            run.next = min(run.next, batch + size - trained % size)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        # Runs while the next batches train, so it must not touch the model or its variables.
        run = self._run
        if run is None:
            return
        run.end_batch(batch)
        checks = not run.has_logs
        if not logs or not (checks or run.moves_within):
            return
        _logs.make_floats(logs)
        names = self._weights.names
        # Read in this order, because the other thread adds to the ledger before it changes the
        # weights.
        current, ledger = self._weights.vector.current, run.ledger
        batch_weights = weights_of_batch(ledger, batch, current)
        if checks:
            run.has_logs = True
            _logs.check_first_logs(logs, names, batch_weights, run.by_record)
        if run.moves_within:
            _logs.add_weights(logs, names, batch_weights)

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:
        run = self._run_of_test()
        if run is None:
            return
        self._sync()
        self._weights.vector.restore()
        # Before validation also records losses.
        self._check_first_batches()
        if self._needs_sums():
            self._add_segment(run)
            # Keras resets the record too, unless the model's `metrics` hides it.
            run.begin_sums()

    def on_test_end(self, logs: dict[str, float] | None = None) -> None:
        run, weights = self._run_of_test(), self._weights
        if run is None:
            return
        self._sync()
        recorded = averages(repeat_count(weights.recorded())) if run.by_record else None
        run.validation = weights.vector.current, recorded
        if self._needs_sums():
            run.take_sums()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        run, weights = self._this_run(), self._weights
        logs = {} if logs is None else logs
        _logs.make_floats(logs)
        if run.moves_within:  # A custom loop may pass the logs of the last batch.
            _logs.remove_weights(logs, weights.names)
        weights.vector.restore()
        if not self._has_losses(run):
            return self._end_empty_epoch(run, epoch)
        ledger, losses = self._epoch_losses(run, logs)
        _logs.add_weights(logs, weights.names, mean_weights(ledger))
        self._check_effect(logs, ledger, losses)
        rest, val_rest = self._rest(logs), self._rest(logs, "val_")
        _logs.add_base_loss(logs, ledger, losses, weights.base_weights, rest)
        val_weights, recorded = run.validation or (weights.vector.current, None)
        if recorded is not None:
            recorded = _logs.logged_if_recorded(
                logs, weights.names, recorded, weights.marks.logged()
            )
        message = _logs.add_val_base_loss(
            logs, weights.names, val_weights, weights.base_weights, recorded, val_rest
        )
        self._messages += [message] if message else []
        self._end_epoch(run, epoch, logs, losses)
        is_rule = type(self).update is not LossWeighting.update
        if self.verbose and is_rule and not self._prints_at_begin:
            _logs.print_weights(type(self).__name__, self._current(), epoch)
        self._warn()

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        run, state, size = self._run, self._weights.state, self._window_size
        self._run, self._assigned = None, {}
        is_short = size is not None and state.periods == 0 and state.window[-1] > 0
        if run is not None and run.begins_window and is_short:
            self._messages.append(
                f"moved no weights: a window has {size} batches (`update_freq={size}`), but only "
                f"{int(state.window[-1])} were trained. Choose a smaller `update_freq`, or 'epoch'."
            )
        self._warn()

    # For users.

    @property
    def outputs(self) -> tuple[str, ...]:
        """Tuple of the output names, in the order given."""
        return self._weights.names

    @property
    def base_weights(self) -> Mapping[str, float]:
        """Read-only dict of output name to base weight: as given, scaled if you called `adapt`."""
        return MappingProxyType(self._weights.by_name(self._weights.base_weights))

    @property
    def factors(self) -> dict[str, float]:
        """Dict of output name to current factor, a float. A copy: change factors with `assign`."""
        return self._weights.by_name(self._weights.state.factors)

    @property
    def loss_weights(self) -> dict[str, LossWeight]:
        """Dict of output name to live weight, for `compile(loss_weights=...)`.

        Each weight is a read-only scalar variable of dtype `floatx`. `float(weight)` is its current
        value, at any time and in any thread. A saved model holds plain floats instead.
        """
        return dict(self._weights.entries)

    @property
    def state(self) -> MutableMapping[str, Any]:
        """The rule's memory: a dict of name to array, saved with the model's weights.

        It is empty at first. Only `update` can write to it, as `self.state[name] = array`.
        """
        memory = self._weights.state.memory
        # Read-only outside `update`.
        outside = cast(MutableMapping[str, Any], MappingProxyType(memory))
        return outside if self._draft is None else self._draft

    @property
    def windows(self) -> list[Window]:
        """List of the completed windows of batches, oldest first: the latest 1000.

        Each has `batches` (their number), `losses` (output name to unweighted average) and
        `weights` (output name to the weight in its last batch).
        """
        return list(self._windows)

    @property
    def variables(self) -> list[keras.Variable]:
        """List of the variables: the weights, shape `(K,)`, and what a `CompoundLoss` recorded.

        `CompoundLoss.stateless_call` takes their values and returns new ones to assign.
        """
        self._sync()
        return list(self._weights.variables)

    def assign(self, factors: Mapping[str, float]) -> None:
        """Sets factors by output name, from the next step on.

        Call it before `fit`, in your own loop, or in `on_epoch_begin`, `on_train_batch_begin` or
        `on_epoch_end` of a callback listed after this one and before those that write files. Before
        a loop of `train_on_batch`, call `set_model(model)`.

        Args:
            factors: Dict of output name to factor, a finite number >= 0. Outputs left out keep
                theirs. 0 switches a loss off until you assign another factor. (An optimizer with
                momentum still moves that loss's layers for a while.)

        Raises:
            ValueError: If a name is not an output, or a factor is invalid.
            RuntimeError: If called in another thread than a running `fit`. Keras may call
                `on_train_batch_end` in another thread.
        """
        self._sync()
        new = _arguments.check_factors(factors, self.factors, self.base_weights, "`assign`")
        self._weights.replace(replace(self._weights.state, factors=new))
        self._assigned.update({name: self.factors[name] for name in factors})

    def adapt(
        self,
        model: keras.Model | Mapping[str, float],
        x: Any = None,
        y: Any = None,
        *,
        all_ranks: bool = True,
        **evaluate: Any,
    ) -> None:
        """Scales the base weights so that each loss starts with its share of the total.

        A loss with base weight `b_k` and average `L_k` gets the base weight `b_k / L_k`, times a
        constant that keeps the sum of the base weights. Rules and `base_loss` use the new base
        weights. The scale is saved with the factors. It survives `reset` and a change of model,
        until you call `adapt` again. `get_config` keeps the base weights as given.

        Call it after `compile`, before `fit` or between two:

            weighting.adapt(model, x, y)
            model.fit(x, y, callbacks=[weighting])

        It can help if losses of the same importance differ in scale. Compare with equal weights. Do
        not use it:

        - for a penalty, such as a KL divergence: use a number or a schedule;
        - for regressions in raw units: scale the targets instead;
        - for a loss that is small before training: it would get almost all of the weight;
        - for losses that can be negative or end at 0.

        Args:
            model: A model compiled with the weights, or with a compound loss that `evaluate` uses.
                It is evaluated once; its parameters, metrics and seeds do not change. Or a dict of
                output name to average loss.
            x: As in `evaluate`.
            y: As in `evaluate`.
            all_ranks: Whether to average over all torch ranks, which must then all call `adapt`
                (with equal averages, if you pass a dict). Use `False` if ranks train different
                models.
            **evaluate: Other arguments of `evaluate`, such as `batch_size` or `sample_weight`.

        Raises:
            ValueError: If a loss or a new base weight is not finite and > 0, a name is not an
                output, or `fit` would refuse the model.
            RuntimeError: If the ranks differ.
        """
        self._sync()
        weights = self._weights
        if isinstance(model, Mapping):
            if x is not None or y is not None or evaluate:
                raise ValueError("`adapt` takes a model and data, or averages and no data.")
            losses = _arguments.check_losses(model, weights.names, "adapt")
            losses = _ranks.same_on_ranks(losses, weights) if all_ranks else losses
        elif not isinstance(model, keras.Model):
            raise ValueError(
                "`adapt` takes a compiled model and its data, or a dict of output name to average "
                f"loss. Found {type(model).__name__}."
            )
        else:
            self.set_model(model)
            sums = evaluated_sums(self, weights, {"x": x, "y": y, **evaluate})
            losses = averages(_ranks.total_of_ranks(sums, weights) if all_ranks else sums)
        by_name = weights.by_name(losses)
        _arguments.check_scale(by_name)
        base_weights = weights.by_name(scaled_weights(weights.given, losses))
        _arguments.check_outputs(base_weights)
        _arguments.check_factors({}, self.factors, base_weights, "`adapt`")
        weights.replace(replace(weights.state, scale=losses))
        if self.verbose:
            _logs.print_base_weights(type(self).__name__, base_weights, by_name)

    def update(self, epoch: int, logs: Mapping[str, float]) -> Mapping[str, float] | None:
        """Returns the factors for the next epoch. Override it to write your own rule.

        The default moves nothing. Changes to `self.state` are dropped if the method raises an
        error.

        Args:
            epoch: Index of the epoch that ends, from 0. With windows, index of the window.
            logs: Dict with `<name>_loss` of each output: its unweighted loss, averaged over the
                epoch or window. After an epoch of `fit`, it also has the other logs, such as
                `val_<name>_loss` and metrics.

        Returns:
            Dict of output name to factor, a finite number >= 0. Outputs left out keep theirs;
            `None` keeps all.
        """
        return None

    def step(
        self, losses: Mapping[str, float] | None = None, *, all_ranks: bool = True
    ) -> dict[str, float]:
        """Ends an epoch of a custom loop: moves the weights by the epoch's average losses.

        `fit` does this itself. Call `step` before `evaluate`, which also records losses. Before a
        loop of `train_on_batch`, call `set_model(model)`. Each `train_on_batch` clears what was
        recorded, so pass `losses` there.

        In a torch process group, all ranks must call it. It averages over them in one all-reduce,
        so that all have the same weights.

        Args:
            losses: Dict of output name to unweighted loss averaged over the epoch (and over all
                ranks), a scalar. If omitted, uses what a `CompoundLoss` recorded since the last
                `step`. If nothing was recorded, nothing happens.
            all_ranks: Use `False` if torch ranks train different models.

        Returns:
            Dict of output name to new weight, a float.

        Raises:
            ValueError: If `losses` has other names than `outputs`, or a value is not a scalar.
            RuntimeError: If a `fit` with a `CompoundLoss` is running, if only some ranks recorded
                losses, or if their outputs, factors, epochs or `losses` differ.
        """
        self._sync()
        weights = self._weights
        if losses is None:
            _wiring.check_no_fit(self._run is not None and self._run.by_record)
            sums = weights.recorded()
            sums = _ranks.total_of_ranks(sums, weights) if all_ranks else sums
            values = averages(repeat_count(sums)) if sums[-1] else None
            if values is None and weights.marks.added:
                weights.marks.added = False
                self._messages.append(
                    "found nothing recorded, although the compound loss was called. Under "
                    "`jax.jit`, assign the variables that `stateless_call` returns to "
                    "`weighting.variables`. Before `train_on_batch`, call "
                    "`weighting.set_model(model)`."
                )
        else:
            given = _arguments.check_losses(losses, weights.names, "step")
            values = _ranks.same_on_ranks(given, weights) if all_ranks else given
        if values is not None:
            logs = {f"{name}_loss": value for name, value in weights.by_name(values).items()}
            periods = weights.state.periods + (self._window_size or 1)
            self._close_period(periods, logs, clear_record=True)
        self._warn()
        return self._current()

    def reset(self) -> None:
        """Starts again from the first epoch: factors 1, empty `state`, no recorded losses.

        Also empties `windows`. Keeps the scale of the base weights that `adapt` found.
        """
        self._sync()
        self._weights.reset()
        self._assigned, self._static = {}, np.ones(3, dtype=bool)
        self._windows.clear()

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that Keras saves. The model's weights hold everything else.

        If your rule has its own arguments, add them, and register the class with
        `keras.saving.register_keras_serializable`.
        """
        given = self._weights.by_name(self._weights.given)
        config = {"outputs": given, "verbose": self.verbose}
        windows = {"update_freq": self._window_size} if self._window_size else {}
        return {**config, **windows}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**keras.saving.deserialize_keras_object(config))

    def __repr__(self) -> str:
        return self._shown()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        # KerasTuner copies callbacks for each trial, but the model keeps the original's variables.
        return self

    __copy__ = __deepcopy__

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_wrapper": None, "_run": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._weights.before_change = self._before_change

    # How the weights move.

    def _close_period(
        self, periods: int, logs: Mapping[str, float], clear_record: bool, **changes: Any
    ) -> None:
        """Calls `update` after an epoch or window, and moves the weights.

        Args:
            periods: the new `State.periods`.
            logs: the logs for `update`.
            clear_record: whether to clear what was recorded.
            **changes: new values of other fields of the state.
        """
        number = periods // (self._window_size or 1)
        source = f"`{type(self).__name__}.update` after {self._unit} {number}"
        changes["periods"] = periods
        self._move(source, lambda: self.update(number - 1, logs), clear_record, **changes)
        self._assigned = {}

    def _move(
        self,
        source: str,
        find: Callable[[], Mapping[str, float] | None],
        clear_record: bool = False,
        **changes: Any,
    ) -> None:
        """Sets the factors that `find` returns, and keeps what it wrote to `self.state`."""
        weights = self._weights
        try:
            # Copies, because a rule may change arrays in place.
            self._draft = {name: np.array(value) for name, value in weights.state.memory.items()}
            found = find()
            found = {} if found is None else found
            factors = _arguments.check_factors(found, self.factors, self.base_weights, source)
            memory = _arguments.check_memory(self._draft, source)
            state = replace(weights.state, factors=factors, memory=memory, **changes)
            weights.replace(state, clear_record)
        finally:
            self._draft = None

    def _end_epoch(self, run: Run, epoch: int, logs: Mapping[str, float], losses: Vector) -> None:
        weights = self._weights
        if self._window_size is None:
            run.begin_epoch()
            own = {f"{name}_loss": loss for name, loss in weights.by_name(losses).items()}
            self._close_period(epoch + 1, {**logs, **own}, clear_record=True)
            return
        if self._ends_window(self._trained(run.batches), self._window_size):
            self._close_window()
        weights.state = replace(weights.state, window=run.window(weights.state.window))
        weights.clear_record()
        self._assigned = {}
        run.begin_epoch()

    def _close_window(self) -> None:
        run, weights = self._this_run(), self._weights
        window = run.window(weights.state.window)
        losses = weights.by_name(averages(window[:-1]))
        closed = Window(int(window[-1]), losses, weights.by_name(run.ledger[-1].weights))
        logs = {f"{name}_loss": loss for name, loss in losses.items()}
        periods = weights.state.periods + closed.batches
        self._close_period(periods, logs, clear_record=False, window=np.zeros_like(window))
        self._windows.append(closed)

    def _trained(self, batches: int) -> int:
        """How many batches were trained in total, after the given number in this epoch."""
        state = self._weights.state
        return state.periods + int(state.window[-1]) + self._this_run().in_window(batches)

    def _ends_window(self, trained: int, size: int) -> bool:
        """Whether a window ends after this total number of trained batches."""
        return trained // size > self._weights.state.periods // size

    def _before_change(self, state: State) -> None:
        """Called before anything changes the weights or the open window."""
        self._close_segment()
        run = self._run
        if run is not None:
            run.moves_within |= run.next > 0
            if state.window is not self._weights.state.window:
                run.begin_window()

    def _close_segment(self) -> None:
        """Records that the batches since the last segment had the current weights."""
        run = self._run
        if run is not None and run.batches > run.in_ledger:
            self._sync()
            self._add_segment(run, run.batches)
            run.next = 1  # Any batch.

    def _add_segment(self, run: Run, end: int | None = None) -> None:
        if run.add_segment(end) and self._window_size:
            self._messages.append(
                "does not know the losses of some batches of the epoch, because an evaluation "
                "overwrote them. In `callbacks`, list the weighting before those that evaluate."
            )

    # What the run knows, and checks of it.

    @property
    def _unit(self) -> str:
        return "window" if self._window_size else "epoch"

    def _current(self) -> dict[str, float]:
        """The weights by output name."""
        return self._weights.by_name(self._weights.vector.current)

    def _this_run(self) -> Run:
        run = self._run
        if run is None or run.thread != threading.get_ident():
            raise RuntimeError(
                f"{self!r} was used by another `fit` or thread at the same time, or "
                "`on_train_begin` was not called. Make one weighting per model. In a custom loop, "
                "call\n    weighting.step({name: average, ...})"
            )
        return run

    def _run_of_test(self) -> Run | None:
        """The run, if an evaluation happens within one of its epochs, after the first batch."""
        run = self._run
        is_within = run is not None and run.thread == threading.get_ident() and run.next > 0
        return run if is_within else None

    def _needs_sums(self) -> bool:
        """Whether the epoch's logs are not enough, as the weights may move within the epoch."""
        run = self._this_run()
        return run.by_record or run.moves_within

    def _has_losses(self, run: Run) -> bool:
        """Whether the epoch had batches and, if the model has a compound loss, used it."""
        if run.parallel is not None:
            # Raises an error if only some ranks had batches: the others would wait for them.
            known = np.full(len(self.outputs), 0.0 if run.batches else np.nan)
            _ranks.same_on_ranks(known, self._weights, run.parallel)
        if run.batches == 0:
            return False
        self._check_first_batches()
        if self._needs_sums():
            self._close_segment()
        if not run.by_record or total(run.ledger)[-1] != 0:
            return True
        if self._weights.state.periods == 0:
            raise ValueError(_wiring.unused_message(self.model))
        return False

    def _end_empty_epoch(self, run: Run, epoch: int) -> None:
        """Ends an epoch that had no losses."""
        reason = "did not use its compound loss" if run.batches else "had no batches"
        self._messages.append(
            f"holds the loss weights: epoch {epoch + 1} {reason}. (In a custom loop, call "
            "`on_train_batch_end` after each batch, or `weighting.step({name: average})`.)"
        )
        run.begin_epoch()
        self._warn()

    def _epoch_losses(self, run: Run, logs: dict[str, float]) -> tuple[Ledger, Vector]:
        """The segments of the epoch, and the averages of its losses."""
        weights, names = self._weights, self.outputs
        unknown = Segment(weights.vector.current, run.batches, np.full(2 * len(names) + 1, np.nan))
        ledger = run.ledger or [unknown]
        losses = averages(total(ledger))
        if run.by_record and is_known(ledger):
            by_name = weights.by_name(losses)
            _logs.add_recorded_losses(logs, by_name, weights.marks.logged())
        _logs.check_logs(logs, names)
        if not is_known(ledger):
            losses = _logs.logged_losses(logs, names, mean_weights(ledger))
        if run.parallel is not None:
            losses = _ranks.same_on_ranks(losses, weights, run.parallel)
        weighted = float(loss_parts(ledger, losses).sum())
        _logs.check_total(logs, weighted)
        if run.by_record:
            _wiring.check_nested(self.model, logs, weighted)
        return ledger, losses

    def _rest(self, logs: Mapping[str, float], prefix: str = "") -> float | None:
        """The part of the total loss that we do not weight; None if only the total tells.

        TensorFlow averages the total over samples, but its parts over batches. If batches differ in
        size, the difference of the two would be wrong.
        """
        is_tensorflow = keras.backend.backend() == "tensorflow"
        is_needed = is_tensorflow and not self._this_run().by_record
        entries = self._weights.entries
        return known_rest(self.model, logs, entries, prefix) if is_needed else None

    def _check_first_batches(self) -> None:
        # Not earlier, because TensorFlow builds the losses in the first batch.
        run, weights = self._this_run(), self._weights
        if run.is_checked:
            return
        run.is_checked = True
        if run.by_record:
            _wiring.check_model(self.model, weights)
        else:
            _wiring.check_metrics(self.model, weights.names)
        if weights.record is not None and not run.is_reset:
            self._sync()
            _wiring.check_record(run.by_record, weights.marks.added, weights.recorded()[-1] != 0)

    def _check_effect(self, logs: Mapping[str, float], ledger: Ledger, losses: Vector) -> None:
        if not self._static.any() or not (is_constant(ledger) or is_known(ledger)):
            return
        weights = self._weights
        static = weights.base_weights, weights.given, np.ones(len(losses))
        self._static = _wiring.static_sums(
            self._static,
            logs.get("loss", math.nan) - fixed_part(self.model, logs, weights.entries),
            loss_parts(ledger, losses),
            np.array([loss_parts(ledger, losses, each).sum() for each in static]),
            weights.by_name(mean_weights(ledger)),
        )

    def _sync(self) -> None:
        if self._run is not None and self._run.thread != threading.get_ident():
            raise RuntimeError(
                "The weighting was used during `fit` in another thread. Call it in "
                "`on_epoch_begin`, `on_train_batch_begin` or `on_epoch_end`. If that `fit` was "
                "interrupted, first call `weighting.on_train_end()`."
            )
        # On JAX, a model's variables have no values while an epoch runs, except within its step.
        # `Callback.model` restores them, and the next step reads them again.
        self.model  # noqa: B018

    def _shown(self, **arguments: Any) -> str:
        base_weights = {name: float(f"{b:.6g}") for name, b in self.base_weights.items()}
        outputs = base_weights if set(base_weights.values()) != {1.0} else list(base_weights)
        current = self._current().items()
        arguments["weights"] = {name: float(f"{weight:.4g}") for name, weight in current}
        shown = ", ".join(f"{name}={value}" for name, value in arguments.items())
        return f"{type(self).__name__}({outputs}, {shown})"

    def _warn(self) -> None:
        messages, self._messages = self._messages, []
        if len(messages) > 5:
            messages[5:] = [f"has {len(messages) - 5} more warnings for this epoch."]
        if messages:
            name = type(self).__name__
            warnings.warn("\n".join(f"{name} {message}" for message in messages), stacklevel=3)
