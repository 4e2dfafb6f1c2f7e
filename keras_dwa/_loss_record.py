"""The variable in which a compound loss records its losses."""

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
        variable: sums of the K losses, each multiplied by its batch's samples, and of the samples.
            The first row has the sums since the last reset, for the logs; the second those since
            the last `take`, which stay exact in a long epoch and after a NaN. Shape `(2, K + 1)`,
            float32 or wider.
    """

    def __init__(self, size: int) -> None:
        # As in `Metric.add_variable`, but without autocasting: in a layer of mixed precision, torch
        # would lose what is assigned.
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
        # The samples since the last reset, at the last `take`.
        self._last_count = 0.0

    def add(self, losses: Any, samples: Any) -> None:
        """Adds a batch.

        Args:
            losses: a tensor of shape `(K,)`, the averages over its samples. In TensorFlow replicas,
                divided by their number, as Keras does with its losses.
            samples: the number of samples.
        """
        backend.add_batch(self.variable, losses, samples, replicas())

    def added(self, sums: Any, losses: Any, samples: Any) -> Any:
        """The variable's value after `add`, if it was `sums` before."""
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
        self._last_count = 0.0

    def take(self, weights: Vector) -> Vector:
        """The `Segment.sums` of the batches since the last call. Each use of a loss is a batch."""
        since_reset, new = self.values()
        # On JAX, Keras undoes what `on_train_batch_begin` assigned if no batch follows.
        if since_reset[-1] == self._last_count:
            new = np.zeros_like(new)
        # On the device: JAX would compare host arrays between processes, and NaN is not equal.
        first = keras.ops.convert_to_tensor(self.variable)[:1]
        self.variable.assign(keras.ops.concatenate([first, keras.ops.zeros_like(first)]))
        self._last_count = float(since_reset[-1])
        return repeat_count(new)


def to_numpy(tensor: Any) -> NDArray[Any]:
    """The tensor as an array. NumPy does not know bfloat16, so that becomes float32."""
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = keras.ops.cast(tensor, "float32")
    array: NDArray[Any] = keras.ops.convert_to_numpy(tensor)
    return array


def replicas() -> Any:
    """The number of TensorFlow replicas that run the current step."""
    is_tensorflow = keras.backend.backend() == "tensorflow"
    tensorflow = sys.modules["tensorflow"] if is_tensorflow else None
    return tensorflow.distribute.get_strategy().num_replicas_in_sync if tensorflow else 1
