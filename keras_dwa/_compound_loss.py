"""The weighted sum of losses outside `compile`: loss terms and custom loops."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras

from keras_dwa._backends import backend
from keras_dwa._loss_weighting import LossWeighting
from keras_dwa._loss_weights import LossWeight


@keras.saving.register_keras_serializable(package="keras_dwa")
class CompoundLoss(keras.metrics.Metric, keras.losses.Loss):
    """Weighted sum of several losses, under the weights of a `LossWeighting`.

    Use it where `compile(loss_weights=...)` cannot help: for several losses on one output, for loss
    terms that are not outputs of the model (a VAE's KL divergence, a PINN's boundary terms), and in
    custom loops.

    Each call also records the unweighted losses, which the logs show as `<name>_loss`. Pass
    `weighting` to `fit` as a callback, and

    - for several losses on one output, compile with `loss=compound`;
    - for loss terms, make it an attribute of the model, which then saves the weights and the rule's
      state. Call `combine` in `compute_loss`, or in your own `train_step` (on JAX, only through
      `compute_loss`). A step may use it several times; each use counts as a batch;
    - in a custom loop, call `weighting.step()` at the end of each epoch, to move the weights by
      what was recorded.

    In functions that you pass to `jax.jit`, use `stateless_call` and `stateless_combine`, because
    variables do not keep what is assigned there. (`fit` takes care of this.)

    Args:
        losses: Dict of name to loss: anything that `keras.losses.get` accepts. Or a sequence of
            names, if you only `combine` terms.
        weighting: The callback with the weights, or its config. Its outputs must have the same
            names.

    Raises:
        ValueError: If the names of `losses` and `weighting` differ, or a loss is invalid.

    Examples:
        >>> import numpy as np
        >>> from keras_dwa import CompoundLoss, DynamicWeightAverage
        >>> dwa = DynamicWeightAverage(["depth", "normals"])
        >>> compound = CompoundLoss({"depth": "mae", "normals": "mse"}, dwa)
        >>> y_true = {"depth": np.zeros((2, 1)), "normals": np.zeros((2, 3))}
        >>> y_pred = {"depth": np.ones((2, 1)), "normals": 2 * np.ones((2, 3))}
        >>> float(compound(y_true, y_pred))
        5.0
        >>> float(compound.combine({"depth": 2.0, "normals": 1.0}))
        3.0
        >>> dwa.step()  # Ends the first epoch.
        {'depth': 1.0, 'normals': 1.0}
    """

    def __init__(self, losses: Mapping[str, Any] | Sequence[str], weighting: LossWeighting) -> None:
        if isinstance(weighting, dict):
            weighting = keras.saving.deserialize_keras_object(weighting)
        if not isinstance(weighting, LossWeighting):
            raise ValueError(f"`weighting` must be a LossWeighting. Found {weighting!r}.")
        _check_names(losses, list(weighting.outputs))
        identifiers = dict(losses) if isinstance(losses, Mapping) else {}
        as_losses = {name: _as_loss(loss) for name, loss in identifiers.items()}
        # Also a metric, because a model tracks metrics that are its attributes.
        super().__init__(name="compound_loss")
        self._weighting, self._weights = weighting, weighting._weights
        self._record = self._weights.start_recording()
        self._identifiers, self._losses = identifiers, as_losses

    def __repr__(self) -> str:
        losses = self._identifiers or list(self._weighting.outputs)
        return f"CompoundLoss({losses}, {self._weighting!r})"

    @property
    def weighting(self) -> LossWeighting:
        """The callback with the weights, for `fit(callbacks=[...])`."""
        return self._weighting

    @property
    def loss_weights(self) -> dict[str, LossWeight]:
        """Dict of output name to live weight, for `compile(loss_weights=...)`."""
        return self._weighting.loss_weights

    @property
    def losses(self) -> dict[str, Any]:
        """Dict of name to loss, as given, for `compile(loss=...)` of a model with these outputs.

        Raises:
            ValueError: If it has only names.
        """
        self._check_has_losses()
        return dict(self._identifiers)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Returns the weighted sum of the outputs' losses, and records the unweighted losses.

        Args:
            y_true: Dict of output name to targets, or one tensor with the targets of every loss.
                Names without a loss are ignored, also in `y_pred`.
            y_pred: Dict of output name to predictions, or one tensor. The first axis is the batch.
            sample_weight: Dict of output name to sample weights, for any of the losses, or one
                tensor for all.

        Returns:
            A scalar tensor of dtype `floatx` or wider.

        Raises:
            ValueError: If `y_true` and `y_pred` are neither two tensors nor dicts with every
                output, or `sample_weight` has an unknown name.
        """
        return self._combine(*self._terms(y_true, y_pred, sample_weight))

    def combine(self, values: Any, samples: Any = 1) -> Any:
        """Returns the weighted sum of loss terms, and records the unweighted terms.

        Args:
            values: Dict of name to the term's value in this batch, a scalar. Or one tensor of shape
                `(K,)`, in the order of `outputs`. In TensorFlow replicas, divide each by their
                number, as Keras does with its losses.
            samples: How much the batch counts in the epoch's average. Pass the number of its
                samples to count a smaller last batch as Keras's own losses do.

        Returns:
            A scalar tensor of dtype `floatx` or wider.

        Raises:
            ValueError: If `values` has other names or another shape, or a value is not a scalar.
        """
        return self._combine(values, samples)

    def stateless_call(
        self, variables: Sequence[Any], y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> tuple[Any, list[Any]]:
        """Does the same as a call, as a pure function, for example in `jax.jit`.

        To record nothing, for example in validation, discard the variables that it returns.

        Args:
            variables: List of the values of `weighting.variables`, in order.
            y_true: As in a call.
            y_pred: As in a call.
            sample_weight: As in a call.

        Returns:
            Tuple of the loss and the list of new values of the variables.

        Raises:
            ValueError: As in a call, or if `variables` has the wrong length.
        """
        return self._stateless(variables, *self._terms(y_true, y_pred, sample_weight))

    def stateless_combine(
        self, variables: Sequence[Any], values: Any, samples: Any = 1
    ) -> tuple[Any, list[Any]]:
        """Does the same as `combine`, as a pure function, for example in `jax.jit`.

        Args:
            variables: List of the values of `weighting.variables`, in order.
            values: As in `combine`.
            samples: As in `combine`.

        Returns:
            Tuple of the loss and the list of new values of the variables.

        Raises:
            ValueError: As in `combine`, or if `variables` has the wrong length.
        """
        return self._stateless(variables, values, samples)

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing. A custom step may call it on all metrics."""

    def result(self) -> dict[str, Any]:
        """Returns the averages of the recorded losses, by `<name>_loss`."""
        return self._weights.result()

    def reset_state(self) -> None:
        """Clears the recorded losses, not the weights."""
        self._weights.reset_state()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        # As for the callback.
        return self

    __copy__ = __deepcopy__

    def __reduce__(self) -> Any:
        # Keras would pickle the config, and load it with another weighting.
        losses = dict(self._identifiers) or self._weighting.outputs
        return type(self), (losses, self._weighting)

    def get_config(self) -> dict[str, Any]:
        losses = self._identifiers or list(self._weighting.outputs)
        return {"losses": losses, "weighting": self._weighting}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**keras.saving.deserialize_keras_object(config))

    def _terms(self, y_true: Any, y_pred: Any, sample_weight: Any) -> tuple[dict[str, Any], Any]:
        """The unweighted losses of a call by output name, and the number of samples."""
        self._check_has_losses()
        names = list(self._losses)
        if _is_tensor(y_true) and _is_tensor(y_pred):
            y_true, y_pred = dict.fromkeys(names, y_true), dict.fromkeys(names, y_pred)
        _check_outputs("y_true", y_true, names)
        _check_outputs("y_pred", y_pred, names)
        if not isinstance(sample_weight, Mapping):
            sample_weight = dict.fromkeys(names, sample_weight)
        elif not set(sample_weight) <= set(names):
            raise ValueError(
                f"`sample_weight` may have the names {names}. Found {list(sample_weight)}."
            )
        values = {}
        for name, loss in self._losses.items():
            weight = sample_weight.get(name)
            # A copy, because Keras multiplies it by the mask in place on torch.
            weight = None if weight is None else keras.ops.copy(weight)
            values[name] = loss(y_true[name], y_pred[name], weight)
        return values, keras.ops.shape(y_pred[names[0]])[0]

    def _combine(self, values: Any, samples: Any) -> Any:
        losses, loss = self._weigh(self._weights.vector.value, values)
        self._record.add(losses, samples)
        return loss

    def _stateless(
        self, variables: Sequence[Any], values: Any, samples: Any
    ) -> tuple[Any, list[Any]]:
        references = self._weights.variables
        if len(variables) != len(references):
            raise ValueError(
                f"`variables` must be the values of `weighting.variables`, {len(references)} of "
                f"them. Found {len(variables)}."
            )
        vector, record = map(keras.ops.convert_to_tensor, variables)
        losses, loss = self._weigh(vector, values)
        return loss, [vector, self._record.added(record, losses, samples)]

    def _weigh(self, weights: Any, values: Any) -> tuple[Any, Any]:
        """The terms as a tensor of shape `(K,)`, and their weighted sum."""
        names = self._weights.names
        if _is_tensor(values):
            terms = values
        elif isinstance(values, Mapping) and values.keys() == self._weights.entries.keys():
            terms = [values[name] for name in names]
        else:
            found = list(values) if isinstance(values, Mapping) else values
            raise ValueError(f"`combine` needs one term for each of {list(names)}. Found {found}.")
        combined: tuple[Any, Any] = backend.combine(weights, terms, names)
        # Set even in a trace. If a step also read it, `torch.compile` would compile again.
        self._weights.marks.added = True
        return combined

    def _check_has_losses(self) -> None:
        if not self._losses:
            raise ValueError(
                "A compound loss with names but no losses can only `combine`. Found "
                f"{self!r}. Give each name a loss: CompoundLoss({{name: loss, ...}}, weighting)"
            )


def _check_names(losses: Any, outputs: list[str]) -> None:
    names = list(losses) if isinstance(losses, (Mapping, list, tuple)) else []
    if sorted(names, key=str) != sorted(outputs):
        raise ValueError(
            f"`losses` must have the names of `weighting`, {outputs}. Found {losses!r}."
        )
    longer = [f"{name}_loss" for name in names if name.endswith("_loss")]
    if longer and not isinstance(losses, Mapping):
        warnings.warn(
            f"These terms would be logged as {longer}. Leave `_loss` out of their names.",
            stacklevel=3,
        )


def _is_tensor(value: Any) -> bool:
    # A data frame has a shape, but also names.
    return hasattr(value, "shape") and not hasattr(value, "keys")


def _check_outputs(argument: str, outputs: Any, names: list[str]) -> None:
    if not isinstance(outputs, Mapping):
        raise ValueError(
            f"A compound loss needs dicts with the outputs {names}, or two tensors. Found a "
            f"{type(outputs).__name__} for `{argument}`."
        )
    if not set(names) <= set(outputs):
        raise ValueError(f"`{argument}` must have the outputs {names}. Found {list(outputs)}.")


# The class in which `compile` wraps loss functions: it handles means, masks, sample weights and
# tensors of different rank. Keras exports only its subclasses.
_LossFunctionWrapper = keras.losses.MeanSquaredError.__base__


def _as_loss(identifier: Any) -> keras.losses.Loss:
    loss = keras.losses.get(identifier)
    if loss is None:
        raise ValueError("A compound loss needs a loss for every name. Found None.")
    return loss if isinstance(loss, keras.losses.Loss) else _LossFunctionWrapper(loss)
