"""The data of a training run, for plotting."""

import csv
import math
import os
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dwa._ledger import Vector

if TYPE_CHECKING:
    from keras_dwa._loss_weighting import LossWeighting


class TrainingRun:
    """The losses and weights of each epoch of a history, and the windows of a weighting."""

    def __init__(
        self,
        columns: Mapping[str, list[Any]],
        weighting: "LossWeighting | None",
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
        # If a second run was appended to a file, they may start at 0 again.
        is_ascending = len(epochs) == len(rows) and bool((np.diff(epochs) > 0).all())
        self.epochs = 1 + (epochs if is_ascending else rows)
        self.totals = [self.values("base_loss"), self.values("val_base_loss")]
        self.has_totals = bool(np.isfinite(self.totals).any())

    def values(self, key: str) -> Vector:
        """The values of a column by epoch: NaN if missing or not finite."""
        values = _floats(self._columns.get(key, []))
        if len(values) == len(self.epochs):
            return values
        filled = np.full(len(self.epochs), np.nan)
        if len(values):
            freq, last = self._validation_freq, int(self.epochs[-1])
            every = range(freq, last + 1, freq) if isinstance(freq, int) else freq
            is_validated = np.isin(self.epochs, list(every)) & key.startswith("val_")
            if is_validated.sum() != len(values):
                raise ValueError(
                    f"`{key}` has {len(values)} values, but there are {len(filled)} epochs. If you "
                    "validated only some, pass the same `validation_freq` as to `fit`, or the file "
                    f"of a CSVLogger. Found `validation_freq = {freq!r}`."
                )
            filled[is_validated] = values
        return filled

    def losses(self, name: str) -> list[Vector]:
        """The unweighted training and validation losses of an output, relative to epoch 1."""
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
        """The weights of an output by epoch, divided by its base weight if known."""
        return self.values(f"{name}_weight") / self._base_weights.get(name, 1.0)

    def window_weights(self, name: str) -> tuple[Vector, Vector]:
        """The batches at which windows begin (and the last one ends), and the weights there."""
        begins = np.cumsum([0, *(window.batches for window in self.windows)], dtype=np.float64)
        weights = [window.weights[name] for window in (*self.windows, self.windows[-1])]
        return begins, np.array(weights) / self._base_weights.get(name, 1.0)


def columns_of(history: Any) -> dict[str, list[Any]]:
    """The columns of a history, as lists by name."""
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
            "`history` must be what `fit` returned, its dict, the path of a CSVLogger file or a "
            f"data frame. Found {type(history).__name__}."
        )
    lists = {str(key): list(values) for key, values in columns.items()}
    if not any(lists.values()):
        raise ValueError(f"`history` has no epochs. Call `fit` first. Found {history!r}.")
    return lists


def _read(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    with open(path, newline="") as file:
        # `CSVLogger` accepts any separator. Its first column is "epoch".
        separator = next((sign for sign in file.readline() if sign in ",;|\t"), ",")
        file.seek(0)
        rows = list(csv.DictReader(file, delimiter=separator))
    return {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}


def _floats(values: Iterable[Any]) -> Vector:
    """The values as floats: NaN if not a finite number, such as the "NA" of `CSVLogger`."""
    floats = np.array([_float(value) for value in values], dtype=np.float64)
    return np.where(np.isfinite(floats), floats, np.nan)


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _names(columns: Mapping[str, Any], weighting: "LossWeighting | None") -> list[str]:
    """The names of the outputs."""
    # `CSVLogger` adds an empty `val_` column for each column if the first epoch has none.
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
            f"`history` lacks the weights or losses of {names or 'outputs'}. In `fit`, list the "
            "weighting that the model was compiled with, before any CSVLogger: "
            f"callbacks=[weighting, ...]. Found {list(columns)}."
        )
    return names
