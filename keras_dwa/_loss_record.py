"""What a compound loss records of each batch, in a variable."""

import sys
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from keras_dwa._backends import backend, unsharded, widest_float
from keras_dwa._ledger import Vector, repeat_count


class LossRecord:
    """The sums of K losses.

    Args:
        size: K.

    Attributes:
        variable: the K losses, each times its batch's samples, and these samples: the sums since
            the last reset, for the logs; and those since the last `take`, which stay exact in a
            long epoch and after a NaN. Shape `(2, K + 1)`, float32 or wider.
    """

    def __init__(self, size: int) -> None:
        # As `Metric.add_variable` does, but not cast within a layer of mixed precision: there,
        # nothing that is assigned would stay on torch.
        with unsharded():
            self.variable = keras.Variable(
                "zeros",
                (2, size + 1),
                widest_float(keras.config.floatx(), "float32"),
                trainable=False,
                autocast=False,
                aggregation="sum",
                synchronization="on_read",
                name="record",
            )
        # Of the samples: the first row as `take` found it, and what it took from the second.
        self._counted = self._taken = 0.0

    def add(self, losses: Any, samples: Any) -> None:
        """Adds a batch.

        Args:
            losses: a tensor of shape `(K,)`, the averages over its samples. As Keras has them where
                TensorFlow runs a step in replicas and adds up the losses: divided by their number.
            samples: how many they are.
        """
        backend.add_batch(self.variable, losses, samples, replicas())

    def added(self, sums: Any, losses: Any, samples: Any) -> Any:
        """What `add` would make of the variable's value `sums`."""
        row = backend.batch_sums(losses, samples, replicas(), self.variable.dtype)
        return sums + keras.ops.stack([row, row])

    def values(self) -> NDArray[np.float64]:
        """The sums, float64."""
        try:
            values: NDArray[Any] = keras.ops.convert_to_numpy(self.variable)
        except TypeError as error:
            raise ValueError(
                "Losses were recorded under `jax.jit`, where variables cannot be updated. Use "
                "`stateless_call` or `stateless_combine` there, and assign the variables that they "
                "return to `weighting.variables`."
            ) from error
        return values.astype(np.float64)

    def clear(self) -> None:
        """Sets all to zero."""
        self.variable.assign(keras.ops.zeros(self.variable.shape))
        self._counted = self._taken = 0.0

    def take(self, weights: Vector) -> Vector:
        """The `Segment.sums` of the batches since the last call; each use of a loss is one."""
        values = self.values()
        counted = float(values[0, -1])
        new = values[1]
        # On JAX, Keras undoes what is assigned as a batch begins, if the data then had none.
        if new[-1] - (counted - self._counted) > 0.5 * self._taken:
            new = np.zeros_like(new)
        # On the devices: JAX would have the processes compare what is on the host, NaN too.
        first = keras.ops.convert_to_tensor(self.variable)[:1]
        self.variable.assign(keras.ops.concatenate([first, keras.ops.zeros_like(first)]))
        self._counted, self._taken = counted, float(new[-1])
        return repeat_count(new)


def to_numpy(tensor: Any) -> NDArray[Any]:
    """The tensor as an array; of float32 for bfloat16."""
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = keras.ops.cast(tensor, "float32")
    array: NDArray[Any] = keras.ops.convert_to_numpy(tensor)
    return array


def replicas() -> Any:
    """How many replicas of the present step TensorFlow runs."""
    is_tensorflow = keras.backend.backend() == "tensorflow"
    tensorflow = sys.modules["tensorflow"] if is_tensorflow else None
    return tensorflow.distribute.get_strategy().num_replicas_in_sync if tensorflow else 1
