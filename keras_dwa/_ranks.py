"""The losses of all processes that train one model: the ranks of a torch process group."""

import json
import math
import sys
import zlib
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from keras_dwa._ledger import Vector
from keras_dwa._loss_weights import LossWeights


def total_of_ranks(sums: Vector, weights: LossWeights) -> Vector:
    """The sums over all ranks. Every rank must call it.

    Args:
        sums: this rank's sums: float64, the last one a count.
        weights: the callback's weights.

    Raises:
        RuntimeError: on all ranks, if only some counted anything, or their states differ.
    """
    rows = _of_ranks(sums, weights)
    empty = [rank for rank, row in enumerate(rows) if row[-1] == 0]
    if 0 < len(empty) < len(rows):
        raise RuntimeError(
            f"Nothing was recorded on ranks {empty} of {len(rows)}. Each rank needs a batch. If "
            "they train different models, pass `all_ranks=False`."
        )
    total: Vector = rows.sum(axis=0)
    return total


def total_in_fit(sums: Vector, weights: LossWeights, parallel: Any) -> Vector:
    """The sums over the ranks that train one model in `fit`.

    Args:
        sums: this rank's sums: float64.
        weights: the callback's weights.
        parallel: the `DistributedDataParallel` in which the model trains; None for one rank.
    """
    if parallel is None:
        return sums
    total: Vector = _of_ranks(sums, weights, parallel).sum(axis=0)
    return total


def same_on_ranks(averages: Vector, weights: LossWeights, parallel: Any = None) -> Vector:
    """The averages of the losses that all ranks have. Every rank must call it.

    Args:
        averages: this rank's averages: float64, shape `(K,)`.
        weights: the callback's weights.
        parallel: the `DistributedDataParallel` in which the model trains, if any.

    Raises:
        RuntimeError: on all ranks, if their averages or states differ.
    """
    # In the size of the sums, in case other ranks call `step` without averages. They then find that
    # this rank recorded nothing.
    rows = _of_ranks(np.append(averages, 0.0), weights, parallel)[:, :-1]
    _check_same("averages of the losses", rows, "Pass averages over all ranks.")
    same: Vector = rows[0]
    return same


def _of_ranks(values: Vector, weights: LossWeights, parallel: Any = None) -> NDArray[np.float64]:
    """The values of all ranks, in order: shape `(ranks, n)`. Only torch has more than one."""
    torch: Any = sys.modules["torch"] if keras.backend.backend() == "torch" else None
    if not (torch and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values[np.newaxis]
    group = getattr(parallel, "process_group", None)
    size = torch.distributed.get_world_size(group)
    known = np.append(weights.vector.current, weights.state.periods)
    names = list(weights.names)
    row = np.concatenate([[zlib.crc32(json.dumps(names).encode())], known, values])
    # Padded, so that ranks with other outputs have the same width.
    width = max(64, 2 ** math.ceil(math.log2(len(row))))
    tensor = torch.zeros((size, width), dtype=torch.float64, device=weights.vector.value.device)
    # Each rank fills its own row, so the sum is exact and shows which ranks differ.
    tensor[torch.distributed.get_rank(group), : len(row)] = torch.as_tensor(row)
    torch.distributed.all_reduce(tensor, group=group)
    rows: NDArray[np.float64] = tensor.cpu().numpy()
    if (rows[:, 0] != rows[0, 0]).any():
        found: list[Any] = [None] * size
        torch.distributed.all_gather_object(found, names, group=group)
        raise RuntimeError(
            f"The names or order of the outputs differ between ranks. Found {found}, by rank. Use "
            "a list in the same order on all ranks. If they train different models in a custom "
            "loop, pass `all_ranks=False`."
        )
    rows = rows[:, 1 : len(row)]
    what = f"weights of {names} or the numbers of past epochs or windows"
    advice = "Use the same base weights, factors and files on all ranks."
    _check_same(what, rows[:, : len(known)], advice)
    return rows[:, len(known) :]


def _check_same(what: str, rows: NDArray[np.float64], advice: str) -> None:
    for rank, row in enumerate(rows):
        if not np.allclose(row, rows[0], atol=0.0, equal_nan=True):
            raise RuntimeError(
                f"The {what} differ between ranks. Found {rows[0].tolist()} on rank 0, "
                f"{row.tolist()} on rank {rank}. {advice} If they train different models in a "
                "custom loop, pass `all_ranks=False`."
            )
