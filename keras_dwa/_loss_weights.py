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
from keras_dwa._loss_record import LossRecord, to_numpy


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
    """All loss weights: a variable of shape `(K,)`.

    Attributes:
        is_frozen: whether the step that JAX compiled last has the values of then as constants.
    """

    is_frozen = False


class JaxLossWeightVector(LossWeightVector):
    """One that says where it has no value: a property that `torch.compile` could not trace."""

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


class LossWeights(LossRecord):
    """The loss weights of all outputs, their rule's state, and the losses recorded.

    Args:
        base_weights: output name to base weight.
        rules: the names of the rule's class and of those that it derives from, in that order.
        has_windows: whether the rule moves the weights within epochs.

    Attributes:
        base_weights: float64 array of shape `(K,)`.
        vector: the weights, as the step reads them: a variable of shape `(K,)` and dtype `floatx`.
        entries: output name to `LossWeight`.
        assigned: the values that `vector` was given last: float64, shape `(K,)`.
        state: factors, memory, epochs and windows.
        epoch: the weights that the batches of the epoch under way had.
        file: what was read since the last epoch began: the name of the rule whose state it was, ""
            if there was none, None if there was no file.
        looks_static: whether the loss was in every epoch so far the sum under the base weights, and
            whether it was that under none. Shape `(2,)`.
        is_distributed: whether the variables were made under a `keras.distribution`.
        parallel: torch's `DistributedDataParallel` in which the epoch under way trains, if in one.
    """

    parallel: Any = None

    def __init__(
        self, base_weights: Mapping[str, float], rules: Sequence[str], has_windows: bool = False
    ) -> None:
        super().__init__(tuple(base_weights), has_windows)
        self.rules = tuple(rules)
        self.base_weights = np.array(list(base_weights.values()), dtype=np.float64)
        is_jax = keras.backend.backend() == "jax"
        self.vector = (JaxLossWeightVector if is_jax else LossWeightVector)(
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
        self.looks_static = np.array([True, True])
        size = len(self.names)
        state = State(np.ones(size), {}, epochs=0, periods=0, window=np.zeros(size + 2))
        self.replace(state, forget_record=True)

    def restore(self) -> None:
        super().restore()
        if not np.array_equal(self.values(), self.assigned):
            self.vector.assign(self.assigned)

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
        new = self.vector.assign(self.base_weights * state.factors)
        self.assigned = to_numpy(new).astype(np.float64)
        self.epoch.change(self.assigned)
        self.state = state
        if forget_record:
            self.called = False
            self.forget()

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


def is_traced(tensor: Any) -> bool:
    """Whether `tensor` stands for one of a computation that JAX compiles."""
    is_jax = keras.backend.backend() == "jax"
    return is_jax and isinstance(tensor, sys.modules["jax"].core.Tracer)


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


def _unpickle(arguments: tuple[Any, ...], stored: dict[str, Any]) -> LossWeights:
    loss_weights = LossWeights(*arguments)
    loss_weights.load_own_variables(stored)
    return loss_weights
