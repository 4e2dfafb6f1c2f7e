"""Dynamic Weight Average as a rule for the loss weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from keras_dwa._formula import check_temperature, dwa_weights, undefined_rates
from keras_dwa._loss_weighting import LossWeighting


@keras.saving.register_keras_serializable(package="keras_dwa")
class DynamicWeightAverage(LossWeighting):
    """Callback that weights each loss by how fast it falls: Dynamic Weight Average (DWA).

    At the end of each epoch, output k gets the factor

        lambda_k(t) = K * exp(r_k(t-1) / T) / sum_i exp(r_i(t-1) / T)
        r_k(t-1) = L_k(t-1) / L_k(t-2)

    where

    - `L_k(t)` is the output's unweighted loss, averaged over epoch t;
    - `r_k(t-1)` is its relative descending rate, small if the loss falls fast;
    - `T` is the temperature: the larger, the more uniform the factors;
    - `K` is the number of outputs. The factors sum to `K`, and are 1 for the first two epochs.

    The weight of output k is `b_k * lambda_k`, with its base weight `b_k`.

    If an average is NaN or infinite, its epoch is left out of the rates. A loss that was 0 before
    and is not 0 now has no rate. In both cases the factors stay, with a warning. See
    `LossWeighting` for what the callback logs, what to monitor, and how its state is saved.

    Args:
        outputs: Names of the outputs that have a loss, as in `compile(loss={name: ...})`: a
            sequence, or a dict of name to base weight (a finite number > 0; 1 for a sequence).
        temperature: `T`, a finite number > 0. The paper uses 2.0.
        update_freq: `"epoch"`, or a number of batches > 0 (a window). With windows, `L_k(t)` is the
            average over window t instead of epoch t.
        verbose: 0 or 1. 1 prints the new weights at the end of each epoch.

    Raises:
        ValueError: If an argument is invalid.

    Examples:
        >>> import keras, numpy as np
        >>> from keras_dwa import DynamicWeightAverage
        >>> inputs = keras.Input((4,))
        >>> depth = keras.layers.Dense(1)(inputs)
        >>> normals = keras.layers.Dense(3)(inputs)
        >>> model = keras.Model(inputs, {"depth": depth, "normals": normals})
        >>> dwa = DynamicWeightAverage(["depth", "normals"])
        >>> losses = {"depth": "mae", "normals": "mse"}
        >>> model.compile(optimizer="sgd", loss=losses, loss_weights=dwa.loss_weights)
        >>> x = np.ones((8, 4))
        >>> y = {"depth": np.ones((8, 1)), "normals": np.ones((8, 3))}
        >>> history = model.fit(x, y, epochs=3, verbose=0, callbacks=[dwa])
        >>> history.history["depth_weight"][:2]
        [1.0, 1.0]
        >>> round(sum(dwa.factors.values()), 5)
        2.0

    Reference:
        Liu, Johns & Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019.
    """

    def __init__(
        self,
        outputs: Sequence[str] | Mapping[str, float],
        temperature: float = 2.0,
        update_freq: str | int = "epoch",
        verbose: int = 0,
    ) -> None:
        super().__init__(outputs, update_freq, verbose)
        self.temperature = temperature

    def __repr__(self) -> str:
        return self._shown(temperature=self.temperature)

    @property
    def temperature(self) -> float:
        """Temperature `T`, a finite number > 0. A new value takes effect at the next update."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = check_temperature(value)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "temperature": self.temperature}

    def update(self, epoch: int, logs: Mapping[str, float]) -> Mapping[str, float] | None:
        names = sorted(self.outputs)  # A loaded file may have them in another order.
        losses = np.array([logs[f"{name}_loss"] for name in names])
        not_finite = ~np.isfinite(losses)
        if not_finite.any():
            message = f"is not finite, so the {self._unit} is left out of the rates"
            self._hold(epoch, message, losses, not_finite)
            return None
        # The averages of the last two epochs, oldest first. Shape (2, K).
        history = np.vstack([*self.state.get("losses", []), losses])[-2:]
        self.state["losses"] = history
        if len(history) < 2:
            return None
        before_previous, previous = history
        undefined = undefined_rates(previous, before_previous)
        if undefined.any():
            self._hold(epoch, "was 0 before, so it has no rate", losses, undefined)
            return None
        flipped = np.sign(previous) * np.sign(before_previous) < 0
        if flipped.any() and "warned_of_sign" not in self.state:
            self.state["warned_of_sign"] = np.array(True)
            self._messages.append(
                f"found that the loss of {_named(names, losses, flipped)} changed its sign after "
                f"{epoch + 1} {self._unit}s. Its rate is negative, which lowers its weight whether "
                "the loss rose or fell."
            )
        factors = dwa_weights(previous, before_previous, self.temperature)
        return dict(zip(names, factors.tolist(), strict=True))

    def _hold(
        self, epoch: int, message: str, losses: NDArray[np.float64], odd: NDArray[np.bool_]
    ) -> None:
        found = _named(sorted(self.outputs), losses, odd)
        self._messages.append(
            f"holds the loss weights after {epoch + 1} {self._unit}s: the loss of {found} "
            f"{message}."
        )


def _named(names: list[str], losses: NDArray[np.float64], odd: NDArray[np.bool_]) -> str:
    pairs = zip(names, losses.tolist(), odd, strict=True)
    return ", ".join(f"{name!r} ({loss})" for name, loss, is_odd in pairs if is_odd)
