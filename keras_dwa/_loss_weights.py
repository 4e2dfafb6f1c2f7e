"""Live loss weights: the vector that a compiled step reads, its entries, and the saved state."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn, Self

import keras
import numpy as np
from numpy.typing import NDArray

from keras_dwa._backends import unsharded
from keras_dwa._formula import scaled_weights
from keras_dwa._ledger import Vector
from keras_dwa._loss_record import LossRecord, to_numpy


@keras.saving.register_keras_serializable(package="keras_dwa")
class LossWeight(keras.Variable):
    """The weight of one output's loss: a read-only scalar variable of dtype `floatx`.

    Keras accepts it in `compile(loss_weights=...)` and multiplies the loss by its current value. A
    saved model holds that value as a plain float, so it loads as an ordinary compiled model.
    """

    def __init__(self, vector: keras.Variable, index: int, output: str) -> None:
        # Keras allocates a value for every variable. Nothing reads this one.
        super().__init__(
            0.0,
            dtype=vector.dtype,
            trainable=False,
            autocast=False,
            name=f"{output}_weight".replace("/", "."),  # Keras keeps "/" for paths.
        )
        self._vector, self._index, self.output = vector, index, output

    @property
    def value(self) -> Any:
        return self._vector.value[self._index]

    def assign(self, value: Any) -> NoReturn:
        raise RuntimeError(
            f"A loss weight is read-only. Found {value!r} assigned to {self.name!r}. Write\n"
            f"    weighting.assign({{{self.output!r}: factor}})"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def __float__(self) -> float:
        # From the host: on JAX, reading a variable in another thread breaks the running step.
        return float(self._vector.current[self._index])

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        # As for the callback. SciKeras copies estimators together with what they compile.
        return self

    __copy__ = __deepcopy__

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "A loss weight cannot be used as a boolean. For a model with one output, write\n"
            f"    model.compile(..., loss={{{self.output!r}: ...}}, "
            "loss_weights=weighting.loss_weights)"
        )

    def get_config(self) -> dict[str, float]:
        return {"value": SavedWeight(self)}

    @classmethod
    def from_config(cls, config: dict[str, float]) -> float:
        return config["value"]


class SavedWeight(float):
    """A weight in a config: a float, which only the legacy HDF5 format treats as an object."""

    def get_config(self) -> NoReturn:
        raise RuntimeError(
            "Keras cannot load live loss weights from a legacy `.h5` file. Save the model as "
            "`.keras`, or its weights as `.weights.h5`."
        )


class LossWeightVector(keras.Variable):
    """All loss weights: a variable of shape `(K,)`.

    Attributes:
        current: the values it was last set to, rounded to its dtype: float64.
    """

    current: Vector

    def set(self, values: Vector) -> None:
        self.current = values.astype(self.dtype).astype(np.float64)
        # An array, since TensorFlow keeps every Python number that it has ever converted.
        self.assign(self.current)

    def restore(self) -> None:
        """Sets the variable to `current` again, if something else changed it.

        On JAX, Keras undoes what `on_train_batch_begin` assigned if no batch follows.
        """
        found = to_numpy(keras.ops.convert_to_tensor(self))
        if not np.array_equal(found, self.current):
            self.assign(self.current)


class JaxLossWeightVector(LossWeightVector):
    """Explains why it has no value. (`torch.compile` could not trace this property.)"""

    @property
    def value(self) -> Any:
        try:
            return super().value
        except TypeError as error:
            raise RuntimeError(
                f"{self.name!r} has no value while an epoch runs on JAX.\n"
                "- To read a weight, use `float(weighting.loss_weights[name])`.\n"
                "- Call a compound loss in `compute_loss`, not in the model's `call`. In a "
                "`train_step`, call `self.stateless_compute_loss`.\n"
                "- In a layer, use `self.add_weight(trainable=False)`, and assign it in a callback."
                "\n- Make one weighting per model."
            ) from error


@dataclass(frozen=True)
class State:
    """What a weighting knows between two epochs. It is replaced as a whole.

    Attributes:
        factors: what the base weights are multiplied by: float64, shape `(K,)`.
        scale: the K losses that `adapt` found, by which the given base weights are divided; 1
            before. Shape `(K,)`.
        memory: name to array: what the rule remembers.
        periods: the number of closed epochs; with windows, of batches in closed windows.
        window: the window that the last epoch left open: the sums of the K losses, each multiplied
            by its count in a batch; the K counts; and the number of batches. Shape `(2K + 1,)`.
    """

    factors: Vector
    scale: Vector
    memory: dict[str, Any]
    periods: int
    window: Vector


class Marks:
    """What happened to a record. A plain object, because Keras's attribute tracking is slow.

    Attributes:
        resets: how often Keras has reset its sums.
        added: whether a compound loss was called since then, if only while a step was traced.
        logged: returns the outputs whose recorded averages go into the model's logs.
    """

    resets, added = 0, False

    def __init__(self, names: tuple[str, ...]) -> None:
        # Until `set_model` knows what the model logs.
        self.logged: Callable[[], tuple[str, ...]] = lambda: names if self.added else ()


class LossWeights(keras.metrics.Metric):
    """The loss weights of all outputs, the state of their rule, and what a compound loss records.

    It is a metric because a model passes the variables of its metrics to every step (JAX would
    otherwise treat them as constants), but does not count them among its own weights.

    Args:
        given: output name to base weight.
        rules: the names of the rule's class and its base classes, in the order of its MRO.

    Attributes:
        names: the outputs' names, in the order of all arrays of shape `(K,)`.
        given: the base weights as given: float64, shape `(K,)`.
        vector: the weights, as the step reads them: a variable of shape `(K,)` and dtype `floatx`.
        entries: output name to `LossWeight`.
        state: factors, memory, closed periods and the open window.
        record: the `LossRecord`; None until `start_recording`.
        before_change: called before the state changes, with the new one.
        is_loaded: whether the state was read from a file since the last epoch began.
    """

    def __init__(self, given: Mapping[str, float], rules: Sequence[str]) -> None:
        super().__init__(name="loss_weighting")
        self.names, self.rules = tuple(given), tuple(rules)
        self.given = np.array(list(given.values()), dtype=np.float64)
        is_jax = keras.backend.backend() == "jax"
        with unsharded():
            self.vector = (JaxLossWeightVector if is_jax else LossWeightVector)(
                self.given,
                dtype=keras.config.floatx(),
                trainable=False,
                autocast=False,
                name="loss_weights",
            )
            # In a proxy, because Keras does not look for variables in it.
            self.entries = MappingProxyType(
                {name: LossWeight(self.vector, k, name) for k, name in enumerate(self.names)}
            )
        self.record: LossRecord | None = None
        self.marks = Marks(self.names)
        self.before_change: Callable[[State], None] = _do_nothing
        self.state = self._initial_state(np.ones(len(self.names)))
        self.reset()

    def __reduce__(self) -> Any:
        # Keras would pickle a saved metric, which has only what `get_config` returns.
        stored: dict[str, Any] = {}
        self.save_own_variables(stored)
        return _unpickle, (self.by_name(self.given), self.rules, stored)

    def by_name(self, values: Vector) -> dict[str, float]:
        """An array of shape `(K,)` as floats by output name."""
        return dict(zip(self.names, values.tolist(), strict=True))

    # What a compound loss records.

    def start_recording(self) -> LossRecord:
        """The record, created on the first call."""
        if self.record is None:
            self.record = LossRecord(len(self.names))
            self.record_variable = self.record.variable  # For Keras to track.
        return self.record

    def recorded(self) -> Vector:
        """The sums since the last reset: of losses, and of samples. Shape `(K + 1,)`."""
        return np.zeros(len(self.names) + 1) if self.record is None else self.record.values()[0]

    def clear_record(self) -> None:
        self.marks.added = False
        if self.record is not None:
            self.record.clear()

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing. A custom step may call it on all metrics."""

    def reset_state(self) -> None:
        """Clears what was recorded, not the weights.

        Keras calls this at the start of each epoch and evaluation, when it resets its own sums.
        """
        self.marks.resets += 1
        self.clear_record()

    def result(self) -> dict[str, Any]:
        """The recorded averages as `<name>_loss`, for the outputs in `marks.logged()`."""
        if self.record is None or not (logged := self.marks.logged()):
            return {}
        sums = keras.ops.convert_to_tensor(self.record.variable)[0]
        averages = sums[:-1] / sums[-1]
        return {f"{name}_loss": averages[self.names.index(name)] for name in logged}

    # The state.

    @property
    def base_weights(self) -> Vector:
        """The base weights, scaled by what `adapt` found: float64, shape `(K,)`."""
        return scaled_weights(self.given, self.state.scale)

    def _initial_state(self, scale: Vector) -> State:
        size = len(self.names)
        return State(np.ones(size), scale, {}, periods=0, window=np.zeros(2 * size + 1))

    def reset(self) -> None:
        """Goes back to the base weights and forgets everything but their scale."""
        self.is_loaded = False
        self.replace(self._initial_state(self.state.scale), clear_record=True)

    def replace(self, state: State, clear_record: bool = False) -> None:
        """Replaces the state as a whole, even on Ctrl-C."""
        self.before_change(state)
        try:
            self._replace(state, clear_record)
        except KeyboardInterrupt:
            self._replace(state, clear_record)
            raise

    def _replace(self, state: State, clear_record: bool) -> None:
        # Even if nothing moves: on JAX, Keras 3.10 compiles the step again when a variable of the
        # model is assigned between epochs for the first time.
        self.vector.set(scaled_weights(self.given, state.scale) * state.factors)
        self.state = state
        if clear_record:
            self.clear_record()

    def save_own_variables(self, store: Any) -> None:
        """Writes the state into a weights file."""
        memory = self.state.memory
        store["rule"] = _as_array([self.rules[0]])
        store["outputs"] = _as_array(list(self.names))
        store["factors"] = self.state.factors
        store["scale"] = self.state.scale
        store["periods"] = np.array(self.state.periods)
        store["window"] = self.state.window
        # By number, because a file may not allow the name.
        store["memory"] = _as_array(list(memory))
        for index, value in enumerate(memory.values()):
            store[f"memory_{index}"] = np.asarray(value)

    def load_own_variables(self, store: Any) -> None:
        """Reads the state from a weights file; keeps its own if the file has none.

        It ignores the memory of another rule.
        """
        if not store.keys():
            return
        outputs = _as_names(store["outputs"])
        if sorted(outputs) != sorted(self.names):
            raise ValueError(
                f"The file holds the loss weights of {outputs}, but this callback has "
                f"{list(self.names)}. Use the file's outputs:\n    outputs={outputs}"
            )
        for field in ("factors", "scale", "periods", "window"):
            _check_field(store, field, len(outputs))
        order = [outputs.index(name) for name in self.names]
        memory = {
            name: np.asarray(store[f"memory_{index}"])
            for index, name in enumerate(_as_names(store["memory"]))
        }
        is_ours = set(_as_names(store["rule"])) <= set(self.rules)
        window = np.asarray(store["window"])
        sums_and_counts = window[:-1].reshape(2, -1)[:, order]
        state = State(
            factors=np.asarray(store["factors"])[order],
            scale=np.asarray(store["scale"])[order],
            memory=memory if is_ours else {},
            periods=int(np.asarray(store["periods"])),
            window=np.append(sums_and_counts, window[-1]),
        )
        self.replace(state, clear_record=True)
        self.is_loaded = True


def _check_field(store: Any, field: str, size: int) -> None:
    """Raises a ValueError unless a weights file has a valid `field` for `size` losses."""
    found = np.asarray(store[field]) if field in set(store.keys()) else np.array(None)
    is_number = found.dtype.kind in "iuf"
    if field == "periods":
        is_valid = is_number and found.shape == () and found >= 0 and found % 1 == 0
    else:
        is_window = field == "window"
        is_valid = is_number and found.shape == ((2 * size + 1,) if is_window else (size,))
        if is_valid:
            # A window starts with sums of losses, which may be any numbers.
            checked = found[size:] if is_window else found
            is_valid = (np.isfinite(checked) & (checked >= 0)).all()
            is_valid = is_valid and (field != "scale" or found.all())
    if not is_valid:
        raise ValueError(
            f"The state of the loss weights in the file is damaged. Found {found.tolist()} as "
            f"`{field}`. The weights stay as they are. Load an earlier file."
        )


def as_float(value: Any) -> float | None:
    """A real number, or a scalar array or tensor of one, as a float; None for anything else."""
    if type(value) is float:
        return value
    array = to_numpy(value) if hasattr(value, "dtype") else np.asarray(value)
    return float(array) if array.shape == () and array.dtype.kind in "biuf" else None


def _as_array(names: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(names).encode(), dtype=np.uint8)


def _as_names(array: Any) -> list[str]:
    names: list[str] = json.loads(bytes(np.asarray(array)))
    return names


def _do_nothing(state: State) -> None:
    pass


def _unpickle(
    given: Mapping[str, float], rules: Sequence[str], stored: dict[str, Any]
) -> LossWeights:
    loss_weights = LossWeights(given, rules)
    loss_weights.load_own_variables(stored)
    return loss_weights
