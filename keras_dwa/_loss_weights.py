"""Live loss weights: the vector that a compiled step reads, its entries, its state in files."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

import keras
import numpy as np
from numpy.typing import NDArray

from keras_dwa._epoch_weights import EpochWeights, Vector


@keras.saving.register_keras_serializable(package="keras_dwa")
class LossWeight(keras.Variable):
    """The weight of one output's loss: a read-only scalar of dtype `floatx`, an entry of a vector.

    Keras accepts it in `compile(loss_weights=...)` and multiplies the loss by its current value. A
    saved model holds that value as a plain float, so that it loads as an ordinary compiled model.
    """

    def __init__(self, vector: keras.Variable, index: int, output: str) -> None:
        # Keras gives every variable storage of its own. Nothing reads this one's.
        super().__init__(
            0.0,
            dtype=vector.dtype,
            trainable=False,
            autocast=False,
            name=f"{output}_weight".replace("/", "."),  # Keras keeps "/" for paths.
        )
        self._vector, self._index, self._output = vector, index, output

    @property
    def value(self) -> Any:
        vector = self._vector.value
        entry = vector[self._index]
        if is_traced(entry):
            self._vector.is_frozen = not is_traced(vector)
        return entry

    def assign(self, value: Any) -> NoReturn:
        raise RuntimeError(
            f"A loss weight is read-only. Found {value!r} assigned to {self.name!r}. Write\n"
            f"    weighting.assign({{{self._output!r}: factor}})"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def __float__(self) -> float:
        # By way of a tensor, since `float` of a variable under a tf.distribute strategy fails.
        return float(to_numpy(keras.ops.convert_to_tensor(self._vector)[self._index]))

    def get_config(self) -> dict[str, float]:
        return {"value": float(self)}

    @classmethod
    def from_config(cls, config: dict[str, float]) -> float:
        return config["value"]


class LossWeightVector(keras.Variable):
    """All loss weights: a variable of shape `(K,)` that says where it has no value.

    Attributes:
        is_frozen: whether the step that JAX compiled last has the values of then as constants.
    """

    is_frozen = False

    @property
    def value(self) -> Any:
        try:
            return super().value
        except TypeError as error:
            raise RuntimeError(
                f"{self.name!r} has no value while an epoch runs on JAX. Read it by `weighting."
                "loss_weights`; call a compound loss in the model's `compute_loss`, not in its "
                "`call`, and that in a `train_step` by `self.stateless_compute_loss`; make a "
                "weighting for each model."
            ) from error


@dataclass(frozen=True)
class State:
    """What a weighting knows between two epochs, replaced as a whole.

    Attributes:
        factors: what the base weights are multiplied by: float64, shape `(K,)`.
        memory: name to array, whatever the rule keeps.
        epochs: how many epochs were closed: in `fit`, those that come before the current one.
        periods: how many windows of batches were closed.
        window: of the window that the last epoch left open: the sums of the K losses, each times
            how much its batch counts, of these counts, and the number of batches. Shape `(K + 2,)`.
    """

    factors: Vector
    memory: dict[str, Any]
    epochs: int
    periods: int
    window: Vector


class LossWeights(keras.metrics.Metric):
    """The loss weights of all outputs, their rule's state, and the losses recorded.

    It is a metric because a model hands the variables of its metrics to every step, where JAX would
    otherwise freeze them, without counting them among its own weights. As a metric it averages the
    losses that a `CompoundLoss` records; without one it measures nothing.

    Args:
        base_weights: output name to base weight.
        rules: the names of the rule's class and of those that it derives from, in that order.
        has_windows: whether the rule moves the weights within epochs.

    Attributes:
        names: the outputs' names, in the order of the arrays of shape `(K,)`.
        base_weights: float64 array of shape `(K,)`.
        vector: the weights, as the step reads them: a variable of shape `(K,)` and dtype `floatx`.
        entries: output name to `LossWeight`.
        assigned: the values that `vector` was given last: float64, shape `(K,)`.
        state: factors, memory and epochs.
        epoch: the weights that the batches of the epoch under way had.
        file: what was read since the last epoch began: the name of the rule whose state it was, ""
            if there was none, None if there was no file.
        record: what was recorded since the last reset: the sums of the K losses, each times its
            batch's samples, and the samples; then the sums of the losses alone, and the batches. A
            variable of shape `(2K + 2,)`, float32 or wider. None until `start_recording`.
        called: whether `add` was called since the last epoch was closed, be it in a trace.
        in_logs: whether the recorded averages are the model's logs. None, for where something is
            recorded, until a model is shown.
        tracked: the outputs whose losses the model logs by metrics of its own.
        was_reset: whether the record was reset since the epoch began.
        was_added: whether `add` was called since the record was reset, be it in a trace.
        is_distributed: whether the variables were made under a `keras.distribution`.
    """

    def __init__(
        self, base_weights: Mapping[str, float], rules: Sequence[str], has_windows: bool = False
    ) -> None:
        super().__init__(name="loss_weighting")
        self.rules, self._has_windows = tuple(rules), has_windows
        self.names = tuple(base_weights)
        self.base_weights = np.array(list(base_weights.values()), dtype=np.float64)
        self.vector = LossWeightVector(
            self.base_weights,
            dtype=keras.config.floatx(),
            trainable=False,
            autocast=False,
            name="loss_weights",
        )
        # In a proxy, where Keras does not look for variables to track.
        self.entries = MappingProxyType(
            {name: LossWeight(self.vector, k, name) for k, name in enumerate(self.names)}
        )
        self.is_distributed = keras.distribution.distribution() is not None
        self.record: Any = None
        self._base: Any = None
        self._folded: Any = 0.0
        self.in_logs: bool | None = None
        self.tracked: frozenset[str] = frozenset()
        self.was_reset = self.was_added = False
        self.epoch = EpochWeights(self.base_weights)
        self.reset()
        self.epoch = EpochWeights(self.assigned)

    def __reduce__(self) -> Any:
        # Keras would pickle a saved metric, which holds only what `get_config` gives.
        stored: dict[str, Any] = {}
        self.save_own_variables(stored)
        arguments = self.by_name(self.base_weights), self.rules, self._has_windows
        return _unpickle, (arguments, stored)

    def by_name(self, values: Vector) -> dict[str, float]:
        """An array of shape `(K,)` as floats by output name."""
        return dict(zip(self.names, values.tolist(), strict=True))

    def values(self) -> Vector:
        """The weights as the step reads them: float64, shape `(K,)`."""
        return to_numpy(keras.ops.convert_to_tensor(self.vector)).astype(np.float64)

    def reset(self) -> None:
        """Goes back to the base weights and forgets everything."""
        self.file: str | None = None
        size = len(self.names)
        state = State(np.ones(size), {}, epochs=0, periods=0, window=np.zeros(size + 2))
        self.replace(state, forget_record=True)

    def replace(self, state: State, forget_record: bool = False) -> None:
        """Goes over to `state`: as a whole, even on Ctrl-C."""
        try:
            self._replace(state, forget_record)
        except KeyboardInterrupt:
            self._replace(state, forget_record)
            raise

    def _replace(self, state: State, forget_record: bool) -> None:
        # An array, since TensorFlow keeps every Python number that it has ever converted. Assigned
        # even where nothing moves: on JAX, Keras 3.10 compiles the step once more when a variable
        # of the model is assigned between epochs for the first time.
        self.vector.assign(self.base_weights * state.factors)
        self.assigned = self.values()
        self.epoch.change(self.assigned)
        self.state = state
        if forget_record:
            self.called = False
            self.reset_state()

    def start_recording(self) -> None:
        """Makes the variable that `add` records in."""
        if self.record is not None:
            return
        size, dtype = 2 * len(self.names) + 2, widest_float(keras.config.floatx(), "float32")
        self.record = self.add_variable((size,), "zeros", dtype, name="record")
        if self._has_windows:
            self._base = self.add_variable((size,), "zeros", dtype, name="record_before")

    def add(self, losses: Any, samples: Any) -> None:
        """Records losses, a tensor of shape `(K,)`, that are the average over some samples."""
        self.called = self.was_added = True
        one = keras.ops.ones((1,))
        values = keras.ops.cast(keras.ops.stop_gradient(losses), self.record.dtype)
        row = keras.ops.concatenate([values, one])
        samples = keras.ops.cast(samples, self.record.dtype)
        self.record.assign_add(keras.ops.concatenate([samples * row, row]))

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: a step of one's own may call it on all metrics."""

    def reset_state(self) -> None:
        """Sets what was recorded to zero, and nothing else.

        Keras calls this at the start of each epoch and of each evaluation.
        """
        self.was_reset, self.was_added = True, False
        self._folded = 0.0
        for variable in (self.record, self._base):
            if variable is not None:
                variable.assign(keras.ops.zeros(variable.shape))

    def result(self) -> dict[str, Any]:
        """The recorded averages as `<name>_loss`, where they are the model's logs."""
        if not (self.was_added if self.in_logs is None else self.in_logs):
            return {}
        record, size = keras.ops.convert_to_tensor(self.record), len(self.names)
        if self._base is not None:
            record = record + keras.ops.convert_to_tensor(self._base)
        averages = record[:size] / record[size]
        return {
            f"{name}_loss": averages[k]
            for k, name in enumerate(self.names)
            if name not in self.tracked
        }

    def recorded(self) -> NDArray[np.float64] | None:
        """What was recorded since the last reset: float64, shape `(2, K + 1)`; None for no batch.

        The averages of the K losses over samples, and how many there were; the same over batches.
        """
        if self.record is None:
            return None
        try:
            values = keras.ops.convert_to_numpy(self.record)
        except TypeError as error:
            raise ValueError(
                "The losses were recorded under `jax.jit`, where a variable cannot keep them. Use "
                "`stateless_call` or `stateless_combine` there, and assign the variables that it "
                "returns to `weighting.variables`."
            ) from error
        record: NDArray[np.float64] = (self._folded + values.astype(np.float64)).reshape(2, -1)
        if not record[:, -1].all():
            return None
        record[:, :-1] /= record[:, -1:]
        return record

    def fold(self) -> None:
        """Keeps what is recorded on the host, so that what comes next is added to 0, exactly."""
        if self._base is not None:
            self._folded = self._folded + to_numpy(keras.ops.convert_to_tensor(self.record))
            self._base.assign(self._folded)
            self.record.assign(keras.ops.zeros(self.record.shape))

    def save_own_variables(self, store: Any) -> None:
        """Writes the state into a weights file."""
        memory = self.state.memory
        store["rule"] = _as_array([self.rules[0]])
        store["outputs"] = _as_array(list(self.names))
        store["factors"] = self.state.factors
        store["epochs"] = np.array([self.state.epochs, self.state.periods])
        store["window"] = self.state.window
        # By number, for a name may be none that a file can have.
        store["memory"] = _as_array(list(memory))
        for index, value in enumerate(memory.values()):
            store[f"memory_{index}"] = np.asarray(value)

    def load_own_variables(self, store: Any) -> None:
        """Reads the state from a weights file; keeps its own if the file has none.

        Another rule's memory is left out: it would be taken for this one's.
        """
        if not store.keys():
            self.file = ""
            return
        (self.file,) = _as_names(store["rule"])
        outputs = _as_names(store["outputs"])
        if sorted(outputs) != sorted(self.names):
            raise ValueError(
                f"The file holds the loss weights of {outputs}, but this callback has "
                f"{list(self.names)}. Make it with the file's outputs:\n    outputs={outputs}"
            )
        order = [outputs.index(name) for name in self.names]
        memory = {
            name: np.asarray(store[f"memory_{index}"])
            for index, name in enumerate(_as_names(store["memory"]))
        }
        epochs, periods = np.asarray(store["epochs"]).tolist()
        *sums, count, batches = np.asarray(store["window"])
        state = State(
            factors=np.asarray(store["factors"])[order],
            memory=memory if self.file in self.rules else {},
            epochs=epochs,
            periods=periods,
            window=np.array([*(sums[k] for k in order), count, batches]),
        )
        self.replace(state, forget_record=True)


def widest_float(*dtypes: Any) -> str:
    """The dtype that holds values of all these, where Keras may have float32 for float64."""
    names = [keras.backend.standardize_dtype(dtype) for dtype in dtypes]
    return "float64" if "float64" in names else keras.backend.result_type(*names)


def to_numpy(tensor: Any) -> NDArray[Any]:
    """The tensor as an array; of float32 for bfloat16, which NumPy does not know."""
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = keras.ops.cast(tensor, "float32")
    array: NDArray[Any] = keras.ops.convert_to_numpy(tensor)
    return array


def is_traced(tensor: Any) -> bool:
    """Whether `tensor` stands for one of a computation that JAX compiles."""
    is_jax = keras.backend.backend() == "jax"
    return is_jax and isinstance(tensor, sys.modules["jax"].core.Tracer)


def as_float(value: Any) -> float | None:
    """A real number, or a scalar array or tensor of one, as a float; None for anything else."""
    array = to_numpy(value) if hasattr(value, "dtype") else np.asarray(value)
    return float(array) if array.shape == () and array.dtype.kind in "biuf" else None


def _as_array(names: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(names).encode(), dtype=np.uint8)


def _as_names(array: Any) -> list[str]:
    names: list[str] = json.loads(bytes(np.asarray(array)))
    return names


def _unpickle(arguments: tuple[Any, ...], stored: dict[str, Any]) -> LossWeights:
    loss_weights = LossWeights(*arguments)
    loss_weights.load_own_variables(stored)
    return loss_weights
