"""What a training run tells of each epoch, for a picture of it."""

import csv
import math
import os
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dwa._epoch_weights import Vector
from keras_dwa._loss_weighting import LossWeighting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_history(
    history: Any,
    weighting: LossWeighting | None = None,
    validation_freq: int | Collection[int] = 1,
) -> "Figure":
    """Draws how the losses of a run fell, and how their weights moved.

    At the top are `base_loss` and `val_base_loss`, if the history has them. Below, each output has
    a row, and all rows have the same scales:

    - its unweighted loss relative to its first epoch, so that outputs of different scale compare:
      training and validation are both divided by the first loss in training that is finite and not
      0 (in validation, if training has none), without its sign. The axis is logarithmic if all are
      positive and two powers of 10 lie among them;
    - its weight in each epoch, and where weights are uniform;
    - if `weighting` has windows, its weight over their batches, from the first of the latest 1000.

    Epochs count from 1, as Keras prints them. A value that is not finite leaves a gap.

    matplotlib comes with `pip install "keras_dwa[plot]"`. pyplot is not used: nothing but a
    notebook shows the figure, and nothing keeps it in memory.

    Args:
        history: what `fit` returned, or the dict in it; the path of a file that a `CSVLogger`
            wrote, listed after the weighting in `callbacks`; or a data frame with such columns.
        weighting: the callback that moved the weights. They are then drawn relative to its base
            weights, and are uniform at 1; without it, they are as logged, and uniform at 1 if base
            weights are. Its windows may be of several calls of `fit`.
        validation_freq: as given to `fit`, where `history` is what that returned, or the dict:
            those do not tell which epochs were validated.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        TypeError: if `history` or `weighting` is none of these.
        ValueError: if `history` has no epochs, lacks the weights or losses of outputs, or has more
            or fewer values of one than epochs.

    Examples:
        >>> from keras_dwa import plot_history
        >>> history = {
        ...     "depth_loss": [8.0, 4.0, 3.0],
        ...     "normals_loss": [0.5, 0.4, 0.4],
        ...     "depth_weight": [1.0, 1.0, 0.93],
        ...     "normals_weight": [1.0, 1.0, 1.07],
        ... }
        >>> figure = plot_history(history)  # Then, say, figure.savefig("history.png")
        >>> loss, weight, *_ = figure.axes
        >>> loss.get_ylabel(), loss.get_title(), weight.get_title()
        ('depth', 'loss (first epoch = 1)', 'weight')
    """
    try:
        from keras_dwa._drawing import draw
    except ImportError as error:
        raise ImportError(
            '`plot_history` needs matplotlib: pip install "keras_dwa[plot]"'
        ) from error
    if not isinstance(weighting, LossWeighting | None):
        raise TypeError(
            "`weighting` must be the callback that moved the weights. "
            f"Found {type(weighting).__name__}."
        )
    return draw(Run(_columns(history), weighting, validation_freq))


class Run:
    """What a history tells of each epoch, and a weighting of its windows."""

    def __init__(
        self,
        columns: Mapping[str, list[Any]],
        weighting: LossWeighting | None,
        validation_freq: int | Collection[int],
    ) -> None:
        self._columns, self._validation_freq = columns, validation_freq
        self.names = _names(columns, weighting)
        self.windows = [] if weighting is None else weighting.windows
        self._base_weights = {} if weighting is None else weighting.base_weights
        self.uniform = "uniform (base weights 1)" if weighting is None else "uniform"
        is_plain = all(weight == 1 for weight in self._base_weights.values())
        self.weight_title = "weight" if is_plain else "weight / base weight"
        rows = np.arange(len(columns[f"{self.names[0]}_weight"]), dtype=np.float64)
        epochs = _floats(columns.get("epoch", []))
        # In a file to which a second run was appended, they may begin with 0 again.
        is_ascending = len(epochs) == len(rows) and bool((np.diff(epochs) > 0).all())
        self.epochs = 1 + (epochs if is_ascending else rows)
        self.totals = [self.values("base_loss"), self.values("val_base_loss")]
        self.has_totals = bool(np.isfinite(self.totals).any())

    def values(self, key: str) -> Vector:
        """Those of a column, in each epoch: NaN where there is none, or none that is finite."""
        values = _floats(self._columns.get(key, []))
        if len(values) == len(self.epochs):
            return values
        filled = np.full(len(self.epochs), np.nan)
        if len(values):
            freq, last = self._validation_freq, int(self.epochs[-1])
            every = range(freq, last + 1, freq) if isinstance(freq, int) else freq
            had = np.isin(self.epochs, list(every)) & key.startswith("val_")
            if had.sum() != len(values):
                raise ValueError(
                    f"`{key}` has {len(values)} values, but there are {len(filled)} epochs. If "
                    "only some were validated, give `validation_freq` as `fit` got it, or a "
                    f"CSVLogger's file. Found `validation_freq = {freq!r}`."
                )
            filled[had] = values
        return filled

    def losses(self, name: str) -> list[Vector]:
        """The unweighted losses of an output in training and validation, as first epoch = 1."""
        if f"{name}_loss" in self._columns:
            losses = [self.values(f"{name}_loss"), self.values(f"val_{name}_loss")]
        else:
            # Keras logs the loss of a single output as `loss` alone, weighted.
            weights = self.values(f"{name}_weight")
            weights[weights == 0] = np.nan
            losses = [self.values("loss") / weights, self.values("val_loss") / weights]
        both = np.concatenate(losses)
        usable = both[np.isfinite(both) & (both != 0)]
        scale = abs(usable[0]) if len(usable) else 1.0
        return [values / scale for values in losses]

    def weights(self, name: str) -> Vector:
        """The weights of an output in each epoch, relative to its base weight if that is known."""
        return self.values(f"{name}_weight") / self._base_weights.get(name, 1.0)

    def window_weights(self, name: str) -> tuple[Vector, Vector]:
        """The batches at which windows begin, and last ends; the weights from there on."""
        begins = np.cumsum([0, *(window.batches for window in self.windows)], dtype=np.float64)
        weights = [window.weights[name] for window in (*self.windows, self.windows[-1])]
        return begins, np.array(weights) / self._base_weights.get(name, 1.0)


def _columns(history: Any) -> dict[str, list[Any]]:
    """What a history holds, by key."""
    columns: Mapping[Any, Any]
    if isinstance(history, keras.callbacks.History):
        columns = {**history.history, "epoch": history.epoch}
    elif isinstance(history, Mapping):
        columns = history
    elif isinstance(history, str | os.PathLike):
        columns = _read(history)
    elif hasattr(history, "columns") and hasattr(history, "__getitem__"):
        columns = {column: history[column] for column in history.columns}
    else:
        raise TypeError(
            "`history` must be what `fit` returned, its dict, the path of a CSVLogger's file or a "
            f"data frame. Found {type(history).__name__}."
        )
    lists = {str(key): list(values) for key, values in columns.items()}
    if not any(lists.values()):
        raise ValueError(f"`history` has no epochs. Call `fit` first. Found {history!r}.")
    return lists


def _read(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    with open(path, newline="") as file:
        # `CSVLogger` takes any separator. It writes "epoch" before the first one.
        separator = next((sign for sign in file.readline() if sign in ",;|\t"), ",")
        file.seek(0)
        rows = list(csv.DictReader(file, delimiter=separator))
    return {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}


def _floats(values: Iterable[Any]) -> Vector:
    """NaN for all that is not a finite number, as the "NA" that `CSVLogger` writes."""
    floats = np.array([_float(value) for value in values], dtype=np.float64)
    return np.where(np.isfinite(floats), floats, np.nan)


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _names(columns: Mapping[str, Any], weighting: LossWeighting | None) -> list[str]:
    """The names of the outputs."""
    # `CSVLogger` adds an empty `val_` column for each other if the first epoch has none.
    weights = [
        key
        for key in columns
        if key.endswith("_weight") and not (key[:4] == "val_" and key[4:] in columns)
    ]
    found = [key.removesuffix("_weight") for key in weights]
    is_single = len(found) == 1 and "loss" in columns
    found = [name for name in found if f"{name}_loss" in columns or is_single]
    names = found if weighting is None else list(weighting.outputs)
    if not names or not set(names) <= set(found):
        raise ValueError(
            f"`history` lacks the weights or losses of {names or 'outputs'}. Give `fit` the "
            "weighting that the model was compiled with, before a CSVLogger: "
            f"callbacks=[weighting, ...]. Found {list(columns)}."
        )
    return names
