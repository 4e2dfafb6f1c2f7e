"""When the loss weights move: the callback that every rule is built on, in Keras's hooks."""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

import keras
import numpy as np

from keras_dwa._attached import AttachedRule
from keras_dwa._compiled import has_own
from keras_dwa._epoch_weights import EpochWeights
from keras_dwa._logs import (
    add_to_logs,
    check_base_loss,
    check_logs,
    epoch_losses,
    print_weights,
)
from keras_dwa._own_steps import OwnSteps
from keras_dwa._ranks import same_in_fit
from keras_dwa._rule import Rule
from keras_dwa._wiring import (
    check_attached,
    check_effect,
    check_first_batches,
    check_model,
    check_one_fit,
    history_messages,
    no_batch_message,
    poisoned,
    put_back,
    start_messages,
    window_messages,
)


@keras.saving.register_keras_serializable(package="keras_dwa")
class LossWeighting(AttachedRule):
    """Moves the loss weights of a multi-output model while it trains, by a rule or by hand.

    The weight of an output's loss is its base weight, which says what is wanted in the end, times
    its factor, 1 at first. Compile the model with `loss_weights=weighting.loss_weights` and pass
    the callback to `fit`. The weights are variables that the compiled step reads, so that they move
    without a new trace.

    Override `update` for a rule of your own: it gets the logs of each epoch and returns the factors
    of the next. By itself it moves nothing: set factors by `assign`, say from another callback.

    After each epoch the callback adds to `logs`:

    - `<name>_weight`: the weight that the epoch's losses had, so that `loss` is the sum of
      `<name>_weight * <name>_loss`, plus regularization. If it changed within the epoch, its mean
      over the batches, each counted as in its losses;
    - `base_loss` and `val_base_loss`: the total loss under the base weights alone. Unlike
      `val_loss` it does not move with the weights: it is the one to monitor. (On TensorFlow, Keras
      averages the total over samples, but its parts over batches, so that it moves a little if the
      last batch is smaller.)

    Callbacks that read these come after this one in the list.

    A model that the callback has not seen starts afresh, with the factors assigned since an epoch
    was last trained; a second `fit` of the same model goes on. One callback serves one model at a
    time. `save_weights`, `ModelCheckpoint` and `BackupAndRestore` store factors and
    `state` with the model's. Pickled between two epochs, the callback keeps them without its model,
    and goes on with the first one that it is given. A copy is the callback itself: the model that
    was compiled with its weights would not see those of another.

    Args:
        outputs: the names of the outputs that have a loss, as in `compile(loss={name: ...})`: a
            sequence, or a dict of name to base weight (a finite number > 0; 1 in a sequence). The
            loss of a nested output goes by its path, `"heads/depth"`.
        update_freq: when `update` is asked in `fit`: "epoch", or a number of batches > 0. It then
            gets the number of such windows that are over, from 0, and their losses alone. A window
            goes on in the next epoch.
        verbose: 0 or 1. 1 prints the weights that `update` sets at the end of each epoch.

    Raises:
        ValueError: if a name, a base weight or `update_freq` is not as described; from `fit`,
            before the first step if the model was not compiled with these weights, after the first
            two if its logs lack `<name>_loss` or have other values than its compound loss got, and
            at the end of the first epoch whose weights clearly differ from the base weights if the
            loss is still the sum under those, or under none.
        RuntimeError: from `fit`, if the callback is in another one at the same time, or was shown
            no model.

    Examples:
        >>> import keras, numpy as np
        >>> from keras_dwa import LossWeighting
        >>> class HalveTheLarger(LossWeighting):
        ...     def update(self, epoch, logs):
        ...         larger = max(self.outputs, key=lambda name: logs[f"{name}_loss"])
        ...         return {larger: 0.5 * self.factors[larger]}
        >>> inputs = keras.Input((4,))
        >>> depth, normals = keras.layers.Dense(1)(inputs), keras.layers.Dense(3)(inputs)
        >>> model = keras.Model(inputs, {"depth": depth, "normals": normals})
        >>> weighting = HalveTheLarger(["depth", "normals"])
        >>> model.compile(
        ...     optimizer="sgd",
        ...     loss={"depth": "mae", "normals": "mse"},
        ...     loss_weights=weighting.loss_weights,
        ... )
        >>> y = {"depth": np.full((8, 1), 100.0), "normals": np.ones((8, 3))}
        >>> history = model.fit(np.ones((8, 4)), y, epochs=3, verbose=0, callbacks=[weighting])
        >>> history.history["depth_weight"]
        [1.0, 0.5, 0.25]
    """

    # Keras then calls `on_train_batch_end` beside the next batches, and waits for none of them.
    async_safe = True

    # Whether the first batches of a `fit` are yet to be checked; whether it was said that no window
    # was over.
    _is_start = _is_short = False

    def __init__(
        self,
        outputs: Sequence[str] | Mapping[str, float],
        update_freq: str | int = "epoch",
        verbose: int = 0,
    ) -> None:
        super().__init__(outputs, update_freq, verbose)
        self._own_steps = OwnSteps(self._weights)

    def reset(self) -> None:
        super().reset()
        self._is_short = False

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        check_attached(self.model, self._weights, self)
        check_model(self.model, self._weights)
        self._thread = threading.get_ident()
        self._is_start = True

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        check_one_fit(self._thread, self)
        weights = self._weights
        self._messages += put_back(weights)
        if self._is_start:
            self._messages += start_messages(weights, self._is_new, epoch)
        self._is_new, weights.file = False, None
        weights.state = replace(weights.state, epochs=epoch)
        # From Keras 3.16 on, `fit` trains in the ranks that there are.
        weights.parallel = self._wrapper or getattr(self.model, "ddp_model", None)
        weights.epoch = EpochWeights(weights.assigned)
        self._begin_epoch()
        by_step = weights.in_logs and has_own(self.model, "train_step")
        self._own_steps = OwnSteps(weights, by_step or bool(weights.tracked))
        weights.reset_state()  # As Keras did, unless the model's `metrics` hides it.
        weights.was_reset = weights.lost = False
        self._warn()

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        epoch = self._weights.epoch
        if self._is_start and epoch.batches:
            self._check_first_batches()
        self._check_terms(batch)
        if not epoch.is_open:
            self._begin_first_batch(batch)
        epoch.begin(batch)
        if self._is_over(batch):
            self._add_sums()
            self._close_window(batch)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        # Called beside the next batches: the model, and on JAX its variables, are theirs.
        weights, epoch = self._weights, self._weights.epoch
        if logs and not epoch.has_ended:
            check_base_loss(logs)
            check_logs(logs, weights.names, epoch.weights, self._own_steps.expected)
        self._own_steps.add_logs(batch + 1, logs or {})
        # Where a call of several steps is not full, Keras numbers those, too, that it lacks.
        steps = (self.params or {}).get("steps")
        epoch.end(batch if steps is None else min(batch, steps - 1))

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:
        # Before validation records, too.
        self._check_first_batches()
        self._check_terms()
        self._complete_sums()

    def on_test_end(self, logs: dict[str, float] | None = None) -> None:
        self._weights.epoch.validation = self._weights.assigned

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        check_one_fit(self._thread, self)
        logs = {} if logs is None else logs
        weights = self._weights
        if not weights.epoch.batches:
            same_in_fit(np.full(len(self.outputs), np.nan), weights)
            # Keras on JAX then puts back the variables' values of an epoch before.
            put_back(weights)
            self._messages.append(no_batch_message(epoch))
            return self._warn()
        self._check_first_batches()
        self._complete_sums()
        mean = weights.epoch.mean()
        self._check_terms()
        logs.update(self._own_steps.missing(logs, weights.epoch.batches))
        check_logs(logs, weights.names, mean)
        losses = same_in_fit(epoch_losses(logs, weights), weights)
        self._messages += add_to_logs(logs, weights)
        if weights.looks_static.any():
            check_effect(self.model, weights, logs, losses)
        self._messages += poisoned(logs.get("loss", math.nan), losses, mean, weights.names)
        weights.epoch.is_open = False
        of_outputs = {f"{name}_loss": loss for name, loss in weights.by_name(losses).items()}
        if self._update_freq == "epoch":
            self._close_period(epoch, {**logs, **of_outputs}, forget_record=True, epochs=epoch + 1)
        else:
            self._end_epoch(epoch)
        if self.verbose > 0 and type(self).update is not Rule.update:
            print_weights(type(self).__name__, weights, epoch)
        self._messages += history_messages(self.model, self.params, epoch)
        self._warn()

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self._thread = self._weights.parallel = None
        self._assigned = {}
        if not self._is_short:
            self._messages += window_messages(self._weights.state, self._update_freq)
            self._is_short = bool(self._messages)
        self._warn()

    def _check_first_batches(self) -> None:
        # Once a batch is done, since TensorFlow builds the losses in it.
        if self._is_start:
            self._is_start = False
            check_first_batches(self.model, self._weights)

    def _check_terms(self, batches: int | None = None) -> None:
        if not self._own_steps.expected:
            return
        if self._own_steps.lacks_record(batches):
            self._sync()
            self._own_steps.add_record(batches)
        self._own_steps.check()
