"""How a compound loss computes: with `keras.ops`, or faster on some backends."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray


class Backend:
    """Uses `keras.ops` only: works on every backend and in a compiled step."""

    def combine(self, weights: Any, terms: Any, names: Sequence[str]) -> tuple[Any, Any]:
        """The terms as one tensor, and their weighted sum.

        Args:
            weights: a tensor of shape `(K,)`.
            terms: a list of K scalars, or a tensor of shape `(K,)`.
            names: the names of the terms, for messages.

        Returns:
            A tensor of shape `(K,)` and a scalar, of the dtype of `weights` or wider.

        Raises:
            ValueError: if a shape is wrong.
        """
        if hasattr(terms, "shape"):
            losses = keras.ops.convert_to_tensor(terms)
            if tuple(losses.shape) != (len(names),):
                raise ValueError(
                    f"A tensor of all losses must have the shape {(len(names),)}, for "
                    f"{list(names)}. Found the shape {tuple(losses.shape)}."
                )
            losses = keras.ops.cast(losses, widest_float(weights.dtype, losses.dtype))
        else:
            scalars = [keras.ops.convert_to_tensor(term) for term in terms]
            # Keras returns an empty loss for a batch without samples.
            scalars = [keras.ops.sum(s) if s.shape == (0,) else s for s in scalars]
            for name, scalar in zip(names, scalars, strict=True):
                if scalar.shape != ():
                    raise ValueError(
                        f"Each loss must be a scalar. Found the shape {tuple(scalar.shape)} for "
                        f"{name!r}. Reduce it first, for example with `keras.ops.mean`."
                    )
            dtype = widest_float(weights.dtype, *(scalar.dtype for scalar in scalars))
            losses = keras.ops.stack([keras.ops.cast(scalar, dtype) for scalar in scalars])
        weights = keras.ops.cast(keras.ops.stop_gradient(weights), losses.dtype)
        return losses, keras.ops.sum(weights * losses)

    def batch_sums(self, losses: Any, samples: Any, replicas: Any, dtype: str) -> Any:
        """What a batch adds to each row of a record: losses times samples, then samples.

        Args:
            losses: a tensor of shape `(K,)` of any float dtype: this replica's part of the average
                over the samples.
            samples: the number of samples, a number or a scalar tensor.
            replicas: the number of replicas.
            dtype: the dtype of the result, whose shape is `(K + 1,)`.
        """
        losses = replicas * keras.ops.cast(keras.ops.stop_gradient(losses), dtype)
        row = keras.ops.concatenate([losses, keras.ops.ones((1,), dtype)])
        # Numbers stay numbers. As tensors, `torch.compile` would compile again for each.
        is_number = isinstance(samples, (int, float))
        return row * (samples if is_number else keras.ops.cast(samples, dtype))

    def add_batch(self, record: Any, losses: Any, samples: Any, replicas: Any) -> None:
        """Adds a batch to a record, a variable of shape `(2, K + 1)`."""
        row = self.batch_sums(losses, samples, replicas, record.dtype)
        record.assign_add(keras.ops.stack([row, row]))

    def to_host(self, variables: Sequence[Any]) -> NDArray[np.float64]:
        """The values of scalar variables, in one transfer: float64."""
        # `keras.ops.stack` refuses variables of TensorFlow's replicas.
        is_tensorflow = keras.backend.backend() == "tensorflow"
        ops: Any = sys.modules["tensorflow"] if is_tensorflow else keras.ops
        stacked = ops.stack([ops.convert_to_tensor(variable.value) for variable in variables])
        values: NDArray[Any] = keras.ops.convert_to_numpy(stacked)
        return values.astype(np.float64)

    def restored_random_state(self) -> AbstractContextManager[None]:
        """Restores the random state that reading the data changes. By default, it changes none."""
        return nullcontext()


class JaxBackend(Backend):
    """On JAX, operations outside a compiled step are slow."""

    def to_host(self, variables: Sequence[Any]) -> NDArray[np.float64]:
        values = sys.modules["jax"].device_get([variable.value for variable in variables])
        return np.array(values, dtype=np.float64)


class TorchBackend(Backend):
    """On torch, a step runs eagerly, and `keras.ops` are several times slower than torch itself."""

    def combine(self, weights: Any, terms: Any, names: Sequence[str]) -> tuple[Any, Any]:
        torch = sys.modules["torch"]
        losses = None if torch.compiler.is_compiling() else _stacked(terms)
        if losses is None or losses.shape != weights.shape:
            return super().combine(weights, terms, names)
        if losses.dtype != weights.dtype or losses.device != weights.device:
            return super().combine(weights, terms, names)
        return losses, torch.dot(losses, weights.detach() if weights.requires_grad else weights)

    def add_batch(self, record: Any, losses: Any, samples: Any, replicas: Any) -> None:
        torch = sys.modules["torch"]
        if torch.compiler.is_compiling() or _is_stateless():
            super().add_batch(record, losses, samples, replicas)
            return
        sums = record.value
        row = torch.cat([losses.detach(), sums.new_ones(1)])
        # A tensor of Python numbers would make a GPU wait.
        if not isinstance(samples, int) or samples != 1:
            row = row.to(sums.dtype) * samples
        sums.add_(row)

    def restored_random_state(self) -> AbstractContextManager[None]:
        # A `DataLoader` draws a seed, even if it does not shuffle.
        context: AbstractContextManager[None] = sys.modules["torch"].random.fork_rng(devices=[])
        return context


def _stacked(terms: Any) -> Any:
    """The terms stacked by torch; None if they are not tensors of one shape and device."""
    torch = sys.modules["torch"]
    try:
        return terms if isinstance(terms, torch.Tensor) else torch.stack(terms)
    except (RuntimeError, TypeError):
        return None


def _is_stateless() -> bool:
    """Whether Keras runs in a `StatelessScope`, where assigning does not change a variable."""
    with keras.StatelessScope(initialize_variables=False) as scope:
        return scope.original_scope is not None


def unsharded() -> AbstractContextManager[None]:
    """Makes each device hold new variables whole, whatever `ModelParallel`'s layout map says."""
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, keras.distribution.ModelParallel):
        return nullcontext()
    layout_map = keras.distribution.LayoutMap(distribution.device_mesh)
    whole = keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name=distribution.batch_dim_name
    )
    scope: AbstractContextManager[None] = whole.scope()
    return scope


def widest_float(*dtypes: Any) -> str:
    """The result dtype of all these as in Keras, but float64 if any of them is float64."""
    names = [keras.backend.standardize_dtype(dtype) for dtype in dtypes]
    return "float64" if "float64" in names else keras.backend.result_type(*names)


def floatx_range() -> tuple[float, float]:
    """The smallest normal number > 0 and the largest number of `floatx`."""
    floatx = keras.config.floatx()
    if floatx == "bfloat16":  # NumPy does not know it.
        return 2.0**-126, float.fromhex("0x1.fep127")
    limits = np.finfo(floatx)
    return float(limits.tiny), float(limits.max)


backends = {"jax": JaxBackend, "torch": TorchBackend}
backend = backends.get(keras.backend.backend(), Backend)()
