"""The plot of a training run."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from keras_dwa._history import TrainingRun, columns_of
from keras_dwa._loss_weighting import LossWeighting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_history(
    history: Any,
    weighting: LossWeighting | None = None,
    validation_freq: int | Collection[int] = 1,
) -> "Figure":
    """Plots the losses and loss weights of a training run.

    The top panel shows `base_loss` and `val_base_loss`, if the history has them. Below, each output
    has a row, with the same scales in all rows:

    - Its unweighted loss, relative to its first epoch, so that outputs of different scale can be
      compared. Training and validation are both divided by the magnitude of the first training loss
      that is finite and not 0 (or else the first such validation loss). The axis is logarithmic if
      all values are positive and span two powers of 10.
    - Its weight in each epoch, with a line where weights are uniform.
    - If `weighting` has windows, its weight over the batches of the latest 1000.

    Epochs count from 1, as Keras prints them. A value that is not finite leaves a gap.

    This needs matplotlib (`pip install matplotlib`). It does not use pyplot: a notebook shows the
    figure, and a script saves it.

    Args:
        history: What `fit` returned, or its dict; the path of a `CSVLogger` file (list the logger
            after the weighting in `callbacks`); or a data frame with the same columns.
        weighting: The callback that moved the weights. If given, weights are divided by its current
            base weights, so that uniform is 1. If not, they are plotted as logged. Its windows can
            come from several calls of `fit`.
        validation_freq: As passed to `fit`. Only a `history` from `fit`, or its dict, needs it,
            because it does not say which epochs were validated.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `history` or `weighting` has another type.
        ValueError: If `history` has no epochs, lacks weights or losses of outputs, or has a column
            with more or fewer values than epochs.

    Examples:
        >>> from keras_dwa import plot_history
        >>> history = {
        ...     "depth_loss": [8.0, 4.0, 3.0],
        ...     "normals_loss": [0.5, 0.4, 0.4],
        ...     "depth_weight": [1.0, 1.0, 0.93],
        ...     "normals_weight": [1.0, 1.0, 1.07],
        ... }
        >>> figure = plot_history(history)  # figure.savefig("history.svg") saves it.
        >>> loss, weight, *_ = figure.axes
        >>> loss.get_ylabel(), loss.get_title(), weight.get_title()
        ('depth', 'loss (first epoch = 1)', 'weight')
    """
    try:
        from keras_dwa._drawing import draw
    except ImportError as error:
        raise ImportError("`plot_history` needs matplotlib: pip install matplotlib") from error
    if not isinstance(weighting, LossWeighting | None):
        raise TypeError(
            "`weighting` must be the callback that moved the weights. "
            f"Found {type(weighting).__name__}."
        )
    return draw(TrainingRun(columns_of(history), weighting, validation_freq))
