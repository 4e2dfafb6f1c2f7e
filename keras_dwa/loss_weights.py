"""Live loss weights: variables that a compiled step reads, and the state that a model tracks."""

import json
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray


@keras.saving.register_keras_serializable(package="keras_dwa")
class LossWeight(keras.Variable):
    """The weight of one output's loss: a non-trainable scalar variable of dtype `floatx`.

    Keras accepts it in `compile(loss_weights=...)` and multiplies the loss by its current value. A
    saved model holds that value as a plain float, so that it loads as an ordinary compiled model.
    """

    def __init__(self, value: float, output: str) -> None:
        super().__init__(
            value,
            dtype=keras.config.floatx(),
            trainable=False,
            autocast=False,
            name=f"{output}_weight".replace("/", "."),  # Keras keeps "/" for paths.
        )

    @property
    def value(self) -> Any:
        try:
            return super().value
        except TypeError as error:
            raise RuntimeError(
                f"{self.name!r} has no value while an epoch runs, as Keras keeps it elsewhere on "
                "JAX. Read it by `dwa.loss_weights`; call a compound loss in the model's "
                "`compute_loss`, not in its `call`, and that one in a `train_step` by "
                "`self.stateless_compute_loss`; for a second model that is trained meanwhile, make "
                "a callback of its own."
            ) from error

    def __float__(self) -> float:
        # By way of a tensor, since `float` of a variable under a tf.distribute strategy fails.
        return float(to_numpy(keras.ops.convert_to_tensor(self)))

    def get_config(self) -> dict[str, float]:
        return {"value": float(self)}

    @classmethod
    def from_config(cls, config: dict[str, float]) -> float:
        return config["value"]


class LossWeights(keras.metrics.Metric):
    """The loss weights of all outputs, with the epoch averages that the next weights come from.

    It is a metric because a model hands the variables of its metrics to every step, where JAX would
    otherwise freeze them, without counting them among its own weights. As a metric it averages the
    losses that a `CompoundLoss` records; without one it measures nothing.

    Args:
        base_weights: output name to base weight.

    Attributes:
        weights: output name to `LossWeight`.
        base_weights: float64 array of shape `(K,)`, in the order of `weights`.
        epoch_losses: the last averages known, oldest first: float64, shape `(0 to 2, K)`.
        epochs: how many epochs were closed: in `fit`, those that come before the current one.
        assigned: the values that `weights` were given last, as floats, by output name.
        loaded: whether the state was read from a file, and no epoch has begun since.
        record: the sums of the K losses recorded since the last reset, then their number: a
            variable of shape `(K + 1,)`, float32 or wider. None until `start_recording`.
        called: whether `update_state` was called since the last epoch was closed, be it in a trace.
        in_logs: whether the recorded averages are the model's logs.
        is_distributed: whether the variables were made under a `keras.distribution`.
    """

    def __init__(self, base_weights: Mapping[str, float]) -> None:
        super().__init__(name="dynamic_weight_average")
        self.weights = {name: LossWeight(value, name) for name, value in base_weights.items()}
        self.base_weights = np.array(list(base_weights.values()), dtype=np.float64)
        self.is_distributed = keras.distribution.distribution() is not None
        self.record: Any = None
        self.in_logs = False
        self.reset()

    def __reduce__(self) -> Any:
        # Keras would pickle a saved metric, which holds only what `get_config` gives.
        state: dict[str, Any] = {}
        self.save_own_variables(state)
        base_weights = dict(zip(self.weights, self.base_weights.tolist(), strict=True))
        return _unpickle, (base_weights, state)

    def reset(self) -> None:
        """Goes back to the base weights and forgets every epoch."""
        self.loaded = False
        self.update(self.base_weights, np.empty((0, len(self.weights))), epochs=0)

    def update(
        self, weights: NDArray[np.floating[Any]], epoch_losses: NDArray[np.float64], epochs: int
    ) -> None:
        """Replaces the state and forgets what was recorded: as a whole, even on Ctrl-C."""
        try:
            self._update(weights, epoch_losses, epochs)
        except KeyboardInterrupt:
            self._update(weights, epoch_losses, epochs)
            raise

    def _update(
        self, weights: NDArray[np.floating[Any]], epoch_losses: NDArray[np.float64], epochs: int
    ) -> None:
        for variable, weight in zip(self.weights.values(), weights, strict=True):
            # An array, since TensorFlow keeps every Python number that it has ever converted.
            variable.assign(np.array(weight))
        self.assigned = self.values()
        self.epoch_losses = epoch_losses
        self.epochs = epochs
        self.called = False
        self.reset_state()

    def values(self) -> dict[str, float]:
        """The weights as floats, by output name."""
        return {name: float(weight) for name, weight in self.weights.items()}

    def take_back(self) -> list[str]:
        """Puts back the weights that were assigned by hand; returns what there is to warn of."""
        found = self.values()
        own = {name: value for name, value in self.assigned.items() if found[name] != value}
        if not own:
            return []
        for name, value in own.items():
            self.weights[name].assign(np.array(value))
        by_hand = {name: found[name] for name in own}
        return [
            f"DynamicWeightAverage found loss weights assigned by hand, {by_hand}, and goes on "
            f"with its own, {own}. For weights of your own, give base weights,\n"
            "    dwa = keras_dwa.DynamicWeightAverage({name: weight, ...})\n"
            "or compile with numbers; for those of a former run, read its weights file. In a loop "
            "of your own under `jax.jit`, read `dwa.variables` anew after each `step`."
        ]

    def start_recording(self) -> None:
        """Makes the variable that `update_state` records in."""
        if self.record is None:
            self.record = self.add_variable(
                shape=(len(self.weights) + 1,),
                initializer="zeros",
                dtype=widest_float(keras.config.floatx(), "float32"),
                name="record",
            )

    def update_state(self, losses: Any, samples: Any) -> None:
        """Records losses, a tensor of shape `(K,)`, that are the average over some samples."""
        self.called = True
        one = keras.ops.ones((1,))
        values = keras.ops.cast(keras.ops.stop_gradient(losses), self.record.dtype)
        samples = keras.ops.cast(samples, self.record.dtype)
        self.record.assign_add(samples * keras.ops.concatenate([values, one]))

    def reset_state(self) -> None:
        """Sets what was recorded to zero, and nothing else.

        Keras calls this at the start of each epoch and of each evaluation.
        """
        if self.record is not None:
            self.record.assign(keras.ops.zeros(self.record.shape))

    def result(self) -> dict[str, Any]:
        """The recorded averages as `<name>_loss`, where they are the model's logs."""
        if not self.in_logs:
            return {}
        record = keras.ops.convert_to_tensor(self.record)
        averages = record[:-1] / record[-1]
        return {f"{name}_loss": averages[k] for k, name in enumerate(self.weights)}

    def recorded_averages(self) -> dict[str, float] | None:
        """The recorded averages as floats by output name; None where nothing was recorded."""
        if self.record is None:
            return None
        try:
            *sums, samples = keras.ops.convert_to_numpy(self.record).tolist()
        except TypeError as error:
            raise ValueError(
                "The losses were recorded in a function under `jax.jit`, where a variable cannot "
                "keep them. Use the compound loss's `stateless_call` or `stateless_combine` there, "
                "and assign the variables that it returns to `dwa.variables`."
            ) from error
        if samples == 0:
            return None
        return {name: value / samples for name, value in zip(self.weights, sums, strict=True)}

    def save_own_variables(self, store: Any) -> None:
        """Writes the state into a weights file."""
        store["outputs"] = np.frombuffer(json.dumps(list(self.weights)).encode(), dtype=np.uint8)
        store["weights"] = np.array(list(self.values().values()))
        store["base_weights"] = self.base_weights
        store["epoch_losses"] = self.epoch_losses
        store["epochs"] = np.array(self.epochs)

    def load_own_variables(self, store: Any) -> None:
        """Reads the state from a weights file; keeps its own if the file has none."""
        if not store.keys():
            return
        outputs = json.loads(bytes(np.asarray(store["outputs"])))
        if sorted(outputs) != sorted(self.weights):
            raise ValueError(
                f"The file holds Dynamic Weight Average's state for the outputs {outputs}, but "
                f"this callback has {list(self.weights)}. Make the callback with the file's "
                f"outputs: keras_dwa.DynamicWeightAverage({outputs})"
            )
        order = [outputs.index(name) for name in self.weights]
        weights = np.asarray(store["weights"])[order]
        base_weights = np.asarray(store["base_weights"])[order]
        lambdas = weights / base_weights
        self.update(
            # Bit by bit as they were, where the base weights are as they were.
            np.where(base_weights == self.base_weights, weights, lambdas * self.base_weights),
            np.asarray(store["epoch_losses"])[:, order],
            epochs=int(np.asarray(store["epochs"])),
        )
        self.loaded = True


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


def _unpickle(base_weights: dict[str, float], state: dict[str, Any]) -> LossWeights:
    loss_weights = LossWeights(base_weights)
    loss_weights.load_own_variables(state)
    return loss_weights
