"""When the weights move: the callback."""

import math
import threading
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import keras
import numpy as np
from numpy.typing import NDArray

from keras_dwa._keras_internals import track
from keras_dwa.formula import check_temperature, dwa_weights, is_positive, undefined_rates
from keras_dwa.loss_weights import LossWeight, LossWeights, to_numpy
from keras_dwa.wiring import (
    check_compiled,
    check_distribution,
    check_log_names,
    check_metrics,
    is_compiled_with,
    lacks_weights,
)


class DynamicWeightAverage(keras.callbacks.Callback):
    """Weights the losses of a multi-output model by how fast each of them falls.

    At the end of each epoch, Dynamic Weight Average gives output k the weight

        lambda_k(t) = K * exp(w_k(t-1) / T) / sum_i exp(w_i(t-1) / T)
        w_k(t-1) = L_k(t-1) / L_k(t-2)

    where `L_k(t)` is the output's unweighted loss averaged over epoch t, `T` the temperature and
    `K` the number of outputs. The weights sum to `K`; for the first two epochs each is 1. A base
    weight `b_k` multiplies it: the weight of output k's loss is `b_k * lambda_k`.

    Compile the model with `loss_weights=dwa.loss_weights` and pass the callback to `fit`. The
    weights are variables that the compiled step reads, so that they move without a new trace.

    After each epoch the callback adds to `logs`:

    - `<name>_weight`: the weight that the epoch's losses had, so that `loss` is the sum of
      `<name>_weight * <name>_loss`, plus regularization;
    - `base_loss` and `val_base_loss`: the total loss under the base weights alone. Unlike
      `val_loss` it does not move with the weights: it is the one to monitor. (On TensorFlow, Keras
      averages the total over samples, but its parts over batches, so that it moves a little if the
      last batch is smaller.)

    Callbacks that read these come after this one in the list.

    A model that the callback has not seen starts afresh; a second `fit` of the same model goes on.
    One callback serves one model at a time: models that are trained in turn have one each.
    `save_weights`, `ModelCheckpoint` and `BackupAndRestore` store the state with the model's.
    Pickled between two epochs, the callback keeps its state without its model, and goes on with the
    first one that it is given. A copy is the callback itself: the model that was compiled with its
    weights would not see those of another.

    Args:
        outputs: the names of the outputs that have a loss, as in `compile(loss={name: ...})`: a
            sequence, or a dict of name to base weight (a finite number > 0; 1 in a sequence). The
            loss of a nested output goes by its path, `"heads/depth"`.
        temperature: `T`, a finite number > 0. The larger, the more uniform the weights. It may be
            assigned later: the weights follow at the end of the epoch.
        verbose: 0 or 1. 1 prints the new weights at the end of each epoch.

    Raises:
        ValueError: if a name, a base weight or the temperature is not as described; from `fit`,
            before the first step if the model was not compiled with these weights, after the first
            if its logs lack `<name>_loss`, and at the end of the first epoch whose weights clearly
            differ from the base weights if the loss is still the sum under those.
        RuntimeError: from `fit`, if the callback is in another one at the same time, or was shown
            no model.

    Example:

    >>> import keras, numpy as np
    >>> from keras_dwa import DynamicWeightAverage
    >>> inputs = keras.Input((4,))
    >>> outputs = {"depth": keras.layers.Dense(1)(inputs), "normals": keras.layers.Dense(3)(inputs)}
    >>> model = keras.Model(inputs, outputs)
    >>> dwa = DynamicWeightAverage(["depth", "normals"])
    >>> model.compile(
    ...     optimizer="sgd",
    ...     loss={"depth": "mae", "normals": "mse"},
    ...     loss_weights=dwa.loss_weights,
    ... )
    >>> x = np.ones((8, 4))
    >>> y = {"depth": np.ones((8, 1)), "normals": np.ones((8, 3))}
    >>> history = model.fit(x, y, epochs=3, verbose=0, callbacks=[dwa])
    >>> history.history["depth_weight"][:2]
    [1.0, 1.0]
    >>> round(sum(float(weight) for weight in dwa.loss_weights.values()), 5)
    2.0

    Reference:
        Liu, Johns & Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019.
    """

    # Keras then calls `on_train_batch_end` beside the next batches, and waits for none of them.
    async_safe = True

    def __init__(
        self,
        outputs: Sequence[str] | Mapping[str, float],
        temperature: float = 2.0,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        self._outputs = _check_outputs(outputs)
        self.temperature = temperature
        self.verbose = verbose
        self._state = LossWeights(self.outputs)
        self._thread: int | None = None
        self._warned_of_sign = False
        self._is_new = self._is_start = False
        self._looks_static = True
        # Those of the epoch under way. None until its first batch is done.
        self._epoch_weights: dict[str, float] | None = None

    def __repr__(self) -> str:
        names: Any = self._outputs if set(self._outputs.values()) != {1.0} else list(self._outputs)
        return f"DynamicWeightAverage({names}, temperature={self.temperature})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # KerasTuner copies its callbacks for every trial, but not the weights that the model has.
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._sync()
        return {**self.__dict__, "_model": None}

    @property
    def outputs(self) -> Mapping[str, float]:
        """The base weights by output name, which stay as they are."""
        return MappingProxyType(self._outputs)

    @property
    def temperature(self) -> float:
        """`T`, a finite number > 0; assigning anything else raises a ValueError."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = check_temperature(value)

    @property
    def loss_weights(self) -> dict[str, LossWeight]:
        """The live weights by output name, in a new dict: for `compile(loss_weights=...)`."""
        self._sync()
        return dict(self._state.weights)

    @property
    def variables(self) -> list[keras.Variable]:
        """The weights, and what a `CompoundLoss` records: the state for its `stateless_call`."""
        self._sync()
        return list(self._state.variables)

    def step(self, losses: Mapping[str, float] | None = None) -> dict[str, float]:
        """Closes an epoch: moves the weights by the averages of its losses.

        `on_epoch_end` calls it; call it yourself only in a loop without `fit`. If that loop calls
        `train_on_batch`, call `set_model(model)` before it, as `fit` does: the model then hands the
        weights to its compiled step. Call `step` before `evaluate`, which records as well.

        Args:
            losses: output name to the unweighted loss averaged over the epoch, a scalar each.
                Without it, the averages that a `CompoundLoss` recorded since the last `step`;
                where there are none, nothing happens.

        Returns:
            The weights by output name, as floats.

        Raises:
            ValueError: if `losses` has other names than `outputs`, or a value is not a scalar.
            RuntimeError: if it would close an epoch of a `fit` that trains by a `CompoundLoss`.
        """
        self._sync()
        state = self._state
        messages = []
        if losses is None:
            if state.in_logs and self._thread is not None:
                raise RuntimeError(
                    "`step` closes an epoch, which `fit` does itself. Read the weights by\n"
                    "    dwa.loss_weights\n"
                    "For a loop of your own after a `fit` that was broken off, end that one by\n"
                    "    dwa.on_train_end()"
                )
            losses = state.recorded_averages()
            if losses is None and state.called:
                state.called = False
                messages.append(
                    "`step` found nothing recorded, although the compound loss was called. In a "
                    "function under `jax.jit`, assign the variables that `stateless_call` returns "
                    "to `dwa.variables`; before `train_on_batch`, call `dwa.set_model(model)`."
                )
        if losses is not None:
            messages = self._close_epoch(self._check_losses(losses))
        _warn(messages)
        return state.values()

    def reset(self) -> None:
        """Goes back to the first epoch: the base weights, no epoch known, nothing recorded."""
        self._sync()
        self._state.reset()
        self._warned_of_sign = self._is_new = False
        self._looks_static = True

    def set_params(self, params: dict[str, Any]) -> None:
        if params is self.params is not None:
            raise ValueError(
                f"`callbacks` has {self!r} more than once. Write\n"
                "    model.fit(..., callbacks=[dwa])"
            )
        super().set_params(params)

    def set_model(self, model: keras.Model) -> None:
        weights = self._state.weights
        # With a compound loss, the weights may enter through the model's `compute_loss` instead.
        self._state.in_logs = self._state.record is not None and not is_compiled_with(
            model, weights
        )
        if not self._state.in_logs:
            check_compiled(model, weights)
        check_distribution(self._state)
        former = self.model
        tracked = getattr(model, self._state.name, None) is self._state
        if tracked and model is former:
            return
        self._attach(model)
        unpickled = former is None and self._state.loaded
        if not unpickled:
            self.reset()
        self._is_new = True
        # Late, so that the next call does it all again if Ctrl-C comes before.
        super().set_model(model)
        if tracked and former is not None:
            warnings.warn(
                "DynamicWeightAverage comes back to a model after it was with another one, and "
                "starts afresh. Models that are trained in turn need a callback each:\n"
                f"    other_dwa = {self!r}\n"
                "    other_model.compile(..., loss_weights=other_dwa.loss_weights)",
                stacklevel=2,
            )

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        if self.model is None:
            raise RuntimeError(
                f"{self!r} was given no model. Write\n"
                "    keras.callbacks.CallbackList([dwa], model=model, ...)"
            )
        self._thread = threading.get_ident()
        self._is_start = True

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self._thread = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._check_one_fit()
        state = self._state
        messages = state.take_back()
        is_behind = self._is_start and epoch > state.epochs
        is_new, is_loaded = self._is_new, state.loaded
        self._is_new = state.loaded = False
        self._epoch_weights = None
        epochs, state.epochs = state.epochs, epoch
        if is_behind and is_loaded:
            messages.append(
                f"Training goes on with epoch {epoch + 1}, but the file that was read knows of "
                f"only {epochs} before it: DynamicWeightAverage goes on from those. If a callback "
                "wrote it before this one moved the weights, list that one last in the next run:\n"
                "    callbacks=[dwa, keras.callbacks.BackupAndRestore(...)]"
            )
        elif is_behind and is_new:
            messages.append(
                f"Training begins with epoch {epoch + 1}, but DynamicWeightAverage starts afresh. "
                "To go on with the state in a weights file, call `dwa.set_model(model)` before "
                "`model.load_weights(...)`. To start here, call `dwa.set_model(model)` and "
                "`dwa.reset()` before `fit`."
            )
        _warn(messages)

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if self._epoch_weights is not None:
            self._check_start()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        # Called beside the next batches: the model, and on JAX its variables, are theirs.
        if self._epoch_weights is None:
            if logs:
                self._check_logs(logs)
            self._epoch_weights = dict(self._state.assigned)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._check_one_fit()
        logs = {} if logs is None else logs
        weights, self._epoch_weights = self._epoch_weights, None
        if weights is None:
            # Keras on JAX then puts back the variables' values of an epoch before.
            self._state.take_back()
            _warn(
                [
                    f"DynamicWeightAverage holds the loss weights: epoch {epoch + 1} had no batch. "
                    "(In a loop of your own, call `on_train_batch_end` for each batch, or "
                    "`dwa.step({name: average, ...})`.)"
                ]
            )
            return
        self._check_start()
        self._check_logs(logs)
        losses = self._losses_of(logs)
        logs.update({f"{name}_weight": weight for name, weight in weights.items()})
        logs["base_loss"] = self._base_loss(logs["loss"], losses, weights)
        if weights == self._state.values():
            self._check_effect(logs["loss"], losses, weights)
        new_weights = self.step(losses)
        if self.verbose > 0:
            shown = ", ".join(f"{name}: {weight:.4f}" for name, weight in new_weights.items())
            print(f"\nEpoch {epoch + 1}: DynamicWeightAverage setting loss weights to {shown}.")
        messages = []
        if lacks_weights(self.model, self.params, epoch):
            messages.append(
                "`History` is in the list of callbacks before DynamicWeightAverage, and lacks what "
                "this one logs. Write\n    model.fit(..., callbacks=[dwa, history])"
            )
        if "val_loss" in logs:
            if missing := self._missing(logs, "val_"):
                messages.append(
                    f"DynamicWeightAverage adds no `val_base_loss`: the logs lack {missing}. A "
                    "`test_step` of your own must return\n"
                    "    self.compute_metrics(x, y, y_pred, sample_weight)"
                )
            else:
                val_losses = self._losses_of(logs, "val_")
                logs["val_base_loss"] = self._base_loss(logs["val_loss"], val_losses, weights)
        _warn(messages)

    def _sync(self) -> None:
        # On JAX, a model's variables have no value while an epoch runs; `Callback.model` puts them
        # back, and the next step takes them from there.
        self.model  # noqa: B018

    def _attach(self, model: keras.Model) -> None:
        name = self._state.name
        former = getattr(model, name, None)
        if not isinstance(former, LossWeights | None):
            raise ValueError(
                f"`model.{name}` is taken: DynamicWeightAverage keeps its state there. Found "
                f"{former!r}. Give that another name."
            )
        track(model, self._state)
        if self._state.in_logs:
            # As `compile` does: a step that TensorFlow traced before does not return our logs.
            model.train_function = model.test_function = None
        tracked = {id(variable) for variable in model.metrics_variables}
        if not tracked.issuperset(map(id, self._state.variables)):
            raise ValueError(
                f"`{type(model).__name__}.metrics` hides the loss weights from the training step, "
                "in which JAX would freeze them. Return `[*super().metrics, ...]` from it."
            )

    def _check_one_fit(self) -> None:
        if self._thread != threading.get_ident():
            raise RuntimeError(
                f"{self!r} was used by another `fit` at the same time, within another callback or "
                "in another thread; or `on_train_begin` was not called. Make a callback for each "
                "model, and in a loop of your own call\n    dwa.step({name: average, ...})"
            )

    def _check_start(self) -> None:
        """Once a batch is done, since TensorFlow builds the losses in it: how they are used."""
        if not self._is_start:
            return
        self._is_start = False
        if not self._state.in_logs:
            # Again, for a callback may have compiled the model since.
            check_compiled(self.model, self._state.weights)
        check_metrics(self.model, self._state)
        called = self._state.recorded_averages() is not None
        if self._state.in_logs and not called:
            raise ValueError(
                "`model` neither was compiled with the loss weights nor called the compound loss "
                "of this callback: they had no effect. Call it in `compute_loss`, or write\n"
                "    model.compile(..., loss=compound.losses, loss_weights=compound.loss_weights)"
            )
        if called and not self._state.in_logs:
            raise ValueError(
                "The compound loss was called in training, and the model compiled with its loss "
                "weights as well. Use one way only; validate by `stateless_call`. (`compile` "
                "without a loss keeps the former one: make the model anew to go over to "
                "`compute_loss`.)"
            )

    def _check_losses(self, losses: Mapping[str, float]) -> NDArray[np.float64]:
        if set(losses) != set(self.outputs):
            raise ValueError(
                f"`step` takes one loss per output of {list(self.outputs)}. Found {list(losses)}."
            )
        return np.array([_as_float(name, losses[name]) for name in self.outputs])

    def _close_epoch(self, averages: NDArray[np.float64]) -> list[str]:
        """Moves the state on; returns what there is to warn of."""
        state = self._state
        epochs = state.epochs + 1
        messages = state.take_back()
        epoch_losses, lambdas, message = self._next(averages, epochs)
        # Assigned even where they stay: on JAX, Keras 3.10 compiles the step once more when a
        # variable of the model is assigned between epochs for the first time.
        held = np.array(list(state.assigned.values()))
        weights = held if lambdas is None else state.base_weights * lambdas
        state.update(weights, epoch_losses, epochs)
        return messages if message is None else [*messages, message]

    def _next(
        self, averages: NDArray[np.float64], epochs: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, str | None]:
        """The averages to remember, the next lambdas (None: the weights stay), and a warning."""
        hold = f"DynamicWeightAverage holds the loss weights after {epochs} epochs: the loss of"
        not_finite = ~np.isfinite(averages)
        if not_finite.any():
            found = self._named(not_finite, averages)
            message = f"{hold} {found} is not finite; the epoch is left out of the rates."
            return self._state.epoch_losses, None, message
        epoch_losses = np.vstack([self._state.epoch_losses, averages])[-2:]
        if len(epoch_losses) < 2:
            return epoch_losses, None, None
        before_previous, previous = epoch_losses
        undefined = undefined_rates(previous, before_previous)
        if undefined.any():
            found = self._named(undefined, averages)
            return epoch_losses, None, f"{hold} {found} rose from 0, so that it has no rate."
        lambdas = dwa_weights(previous, before_previous, self.temperature)
        flipped = np.sign(previous) * np.sign(before_previous) < 0
        if not flipped.any() or self._warned_of_sign:
            return epoch_losses, lambdas, None
        self._warned_of_sign = True
        message = (
            f"The loss of {self._named(flipped, previous)} changed its sign after {epochs} epochs. "
            "DynamicWeightAverage assumes that losses keep theirs: a negative rate lowers a "
            "weight, however the loss moved."
        )
        return epoch_losses, lambdas, message

    def _named(self, affected: NDArray[np.bool_], values: NDArray[np.float64]) -> str:
        pairs = zip(self.outputs, values.tolist(), affected, strict=True)
        return ", ".join(f"{name!r} ({value})" for name, value, named in pairs if named)

    def _loss_keys(self, logs: Mapping[str, float], prefix: str) -> list[str]:
        keys = [f"{prefix}{name}_loss" for name in self.outputs]
        # Keras logs the loss of a single output as `loss` alone.
        return [f"{prefix}loss"] if len(keys) == 1 and keys[0] not in logs else keys

    def _missing(self, logs: Mapping[str, float], prefix: str = "") -> list[str]:
        keys = [f"{prefix}loss", *self._loss_keys(logs, prefix)]
        return [key for key in keys if key not in logs]

    def _losses_of(self, logs: Mapping[str, float], prefix: str = "") -> dict[str, float]:
        keys = self._loss_keys(logs, prefix)
        return {name: float(logs[key]) for name, key in zip(self.outputs, keys, strict=True)}

    def _check_logs(self, logs: Mapping[str, float]) -> None:
        if missing := self._missing(logs):
            raise ValueError(
                f"`logs` lacks {missing}, which DynamicWeightAverage needs. It has {list(logs)}. "
                "Name the outputs as in the logs (without `_loss`). A `train_step` of your own "
                "must return\n    self.compute_metrics(x, y, y_pred, sample_weight)\nand a "
                "`compute_loss` of your own start from\n    loss = super().compute_loss(x, y, "
                "y_pred, sample_weight, training)\nor call a keras_dwa.CompoundLoss, with "
                "`compile` without a loss."
            )
        ours = [*(f"{name}_weight" for name in self.outputs), "base_loss", "val_base_loss"]
        if taken := [key for key in ours if key in logs]:
            raise ValueError(
                f"`logs` has {taken} already, where DynamicWeightAverage would write. Give that "
                "metric another name."
            )

    def _check_effect(
        self, total: float, losses: Mapping[str, float], weights: Mapping[str, float]
    ) -> None:
        """Raises if the loss is, as in every epoch so far, the sum under the base weights."""
        weighted = sum(weights[name] * losses[name] for name in losses)
        static = sum(self.outputs[name] * losses[name] for name in losses)
        if not math.isfinite(total + static):
            return
        if total == 0 < min(losses.values()):
            raise ValueError(
                f"`loss` was 0 in the logs, although its parts were {dict(losses)}. A `train_step` "
                "of your own must update Keras's metric of it:\n"
                "    for metric in self.metrics:\n"
                "        if metric.name == 'loss':\n"
                "            metric.update_state(loss)"
            )
        self._looks_static &= math.isclose(total, static, rel_tol=1e-5)
        if self._looks_static and not math.isclose(weighted, static, rel_tol=1e-3):
            raise ValueError(
                f"The weights do not reach the loss: it was {total}, the sum under the base "
                f"weights, although the weights were {dict(weights)}. A `compute_loss` of your own "
                "must return what it computes from\n"
                "    super().compute_loss(x, y, y_pred, sample_weight, training)\n"
                "or from a keras_dwa.CompoundLoss; a `train_step`, apply the gradient of "
                "`self.compute_loss(...)`. Leave `loss` as Keras logs it."
            )

    def _base_loss(
        self, total: float, losses: Mapping[str, float], weights: Mapping[str, float]
    ) -> float:
        if not math.isfinite(total):
            return total
        return total + sum(
            (base_weight - weights[name]) * losses[name]
            for name, base_weight in self.outputs.items()
        )


def _warn(messages: list[str]) -> None:
    # Called last, for a warning may be an error.
    if messages:
        warnings.warn("\n".join(messages), stacklevel=3)


def _as_float(name: str, loss: Any) -> float:
    value = to_numpy(loss) if hasattr(loss, "dtype") else np.asarray(loss)
    if value.shape != () or value.dtype.kind not in "iuf":
        raise ValueError(
            "`step` takes the average of each loss over the epoch, a real number or a scalar "
            f"tensor. Found {loss!r} for {name!r}."
        )
    return float(value)


def _check_outputs(outputs: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    if isinstance(outputs, str) or not isinstance(outputs, (Sequence, Mapping)):
        raise ValueError(
            "`outputs` must be a sequence of output names, or a dict of name to base weight. "
            f"Found `outputs = {outputs!r}`."
        )
    names = list(outputs)
    if not names:
        raise ValueError(f"`outputs` must name at least one output. Found `outputs = {outputs}`.")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"`outputs` must hold names. Found {name!r} in `outputs = {outputs}`.")
        if names.count(name) > 1:
            raise ValueError(f"`outputs` names {name!r} more than once: `outputs = {outputs}`.")
    base_weights = outputs if isinstance(outputs, Mapping) else dict.fromkeys(names, 1.0)
    for name, base_weight in base_weights.items():
        if not is_positive(base_weight) or not _fits_floatx(base_weight, len(names)):
            raise ValueError(
                "A base weight must be a finite number > 0, and stay so in "
                f"{keras.config.floatx()}. Found {base_weight!r} for {name!r}."
            )
    check_log_names(names)
    return {name: float(base_weight) for name, base_weight in base_weights.items()}


def _fits_floatx(base_weight: float, count: int) -> bool:
    # The largest weight of an output is its base weight times the number of outputs. NumPy does not
    # know bfloat16, which has the range of float32.
    floatx = keras.config.floatx()
    limits = np.finfo("float32" if floatx == "bfloat16" else floatx)
    return float(limits.tiny) <= base_weight <= float(limits.max) / count
