"""What a compound loss records, in a metric that a model tracks."""

import sys
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from keras_dwa._backends import backend, widest_float


class LossRecord(keras.metrics.Metric):
    """The losses that a compound loss records, averaged; without one, nothing.

    It is a metric because a model hands the variables of its metrics to every step, where JAX would
    otherwise freeze them, without counting them among its own weights.

    Args:
        names: the outputs' names, in the order of the arrays of shape `(K,)`.
        has_windows: whether the record is taken within epochs.

    Attributes:
        record: what was recorded since the last reset: the sums of the K losses, each times its
            batch's samples, and the samples; then the sums of the losses alone, and the batches. A
            variable of shape `(2, K + 1)`, float32 or wider. None until `start_recording`.
        called: whether `add` was called since the last epoch was closed, be it in a trace.
        in_logs: whether the recorded averages are the model's logs. None, for where something is
            recorded, until a model is shown.
        tracked: the outputs whose losses the model logs by metrics of its own.
        was_reset: whether the record was reset since the epoch began.
        was_added: whether `add` was called since the record was reset, be it in a trace.
        taken: of the sums of the epoch, what `take` was given last. Shape `(K + 1,)`.
        lost: whether a reset came since then.
    """

    def __init__(self, names: Sequence[str], has_windows: bool) -> None:
        super().__init__(name="loss_weighting")
        self.names, self._has_windows = tuple(names), has_windows
        self.record: Any = None
        # What `fold` took out of the record: for the logs, and exactly, on the host.
        self._base: Any = None
        self._folded = np.zeros(2 * len(self.names) + 2)
        self.called = False
        self.in_logs: bool | None = None
        self.tracked: frozenset[str] = frozenset()
        self.was_reset = self.was_added = self.lost = False
        self.taken = np.zeros(len(self.names) + 1)

    def start_recording(self) -> None:
        """Makes the variable that `add` records in."""
        if self.record is not None:
            return
        self.record = self._new_variable("record")
        if self._has_windows:
            self._base = self._new_variable("record_before")

    def _new_variable(self, name: str) -> keras.Variable:
        # As `add_variable` does, but not cast within a layer of mixed precision: there, nothing
        # that is assigned would stay on torch.
        return keras.Variable(
            "zeros",
            (2, len(self.names) + 1),
            widest_float(keras.config.floatx(), "float32"),
            trainable=False,
            autocast=False,
            aggregation="sum",
            synchronization="on_read",
            name=name,
        )

    def add(self, losses: Any, samples: Any) -> None:
        """Records losses, a tensor of shape `(K,)`, that are the average over some samples.

        As Keras has them where TensorFlow runs the step in several replicas and adds up the losses:
        divided by the number of replicas.
        """
        # Past what Keras does when a metric's attribute is set, which takes its time; and always,
        # since `torch.compile` would compile again for the other value of what is read.
        object.__setattr__(self, "called", True)
        object.__setattr__(self, "was_added", True)
        backend.add_batch(self.record, losses, samples, _replicas())

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: a step of one's own may call it on all metrics."""

    def reset_state(self) -> None:
        """Sets what was recorded to zero, and nothing else.

        Keras calls this at the start of each epoch and of each evaluation, when it resets what it
        sums up itself.
        """
        self.forget()
        self.lost, self.taken = True, np.zeros_like(self.taken)

    def forget(self) -> None:
        """Sets what was recorded to zero."""
        self.was_reset, self.was_added = True, False
        self._folded = np.zeros_like(self._folded)
        if self.in_logs:
            self.taken = np.zeros_like(self.taken)
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
        averages = record[0, :size] / record[0, size]
        return {
            f"{name}_loss": averages[k]
            for k, name in enumerate(self.names)
            if name not in self.tracked
        }

    def take(self, sums: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """What came to the sums of the epoch since the last call; None if a reset took some."""
        with np.errstate(invalid="ignore"):
            new: NDArray[np.float64] = sums - self.taken
        was_lost, self.taken, self.lost = self.lost, sums, False
        return None if was_lost else new

    def values_of_record(self) -> NDArray[np.float64]:
        """The record since it was folded, or reset: float64, shape `(2K + 2,)`."""
        try:
            values: NDArray[Any] = keras.ops.convert_to_numpy(self.record)
        except TypeError as error:
            raise ValueError(
                "The losses were recorded under `jax.jit`, where a variable cannot keep them. Use "
                "`stateless_call` or `stateless_combine` there, and assign the variables that it "
                "returns to `weighting.variables`."
            ) from error
        return values.astype(np.float64).ravel()

    def sums(self) -> NDArray[np.float64]:
        """All that was recorded since the last reset: float64, shape `(2K + 2,)`."""
        return self._folded if self.record is None else self._folded + self.values_of_record()

    def recorded(self) -> NDArray[np.float64] | None:
        """The `averages` of what was recorded since the last reset."""
        return averages(self.sums())

    def fold(self) -> None:
        """Takes what is recorded out of the record, so that what comes next is added to 0."""
        if self._base is not None:
            self._folded = self._folded + self.values_of_record()
            self._move_to_base()

    def restore(self) -> None:
        """Takes it out once more, where Keras put it back.

        On JAX it does so with what was assigned as a batch began, if the data then had none.
        """
        if self._base is not None:
            batches = keras.ops.convert_to_numpy(self._base)[-1, -1]
            if batches < self._folded[-1] - 0.5:
                self._move_to_base()

    def _move_to_base(self) -> None:
        # On the devices: JAX would have the processes compare what is on the host, NaN too.
        self._base.assign(keras.ops.add(self._base, self.record))
        self.record.assign(keras.ops.zeros(self.record.shape))
        self.taken = np.zeros_like(self.taken)


def averages(sums: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """What recorded sums come to: float64, shape `(2, K + 1)`; None for no batch.

    The averages of the K losses over samples, and how many there were; the same over batches.
    """
    record = sums.reshape(2, -1)
    if not record[:, -1].all():
        return None
    return np.hstack([record[:, :-1] / record[:, -1:], record[:, -1:]])


def to_numpy(tensor: Any) -> NDArray[Any]:
    """The tensor as an array; of float32 for bfloat16, which NumPy does not know."""
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = keras.ops.cast(tensor, "float32")
    array: NDArray[Any] = keras.ops.convert_to_numpy(tensor)
    return array


def _replicas() -> Any:
    """How many replicas of the present step TensorFlow runs."""
    is_tensorflow = keras.backend.backend() == "tensorflow"
    tensorflow = sys.modules["tensorflow"] if is_tensorflow else None
    return tensorflow.distribute.get_strategy().num_replicas_in_sync if tensorflow else 1
