"""The picture of a training run."""

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
        weighting: the callback that moved the weights. They are then drawn relative to its present
            base weights, and are uniform at 1; without it, they are as logged, and uniform at 1 if
            base weights are. Its windows may be of several calls of `fit`.
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
        raise ImportError("`plot_history` needs matplotlib: pip install matplotlib") from error
    if not isinstance(weighting, LossWeighting | None):
        raise TypeError(
            "`weighting` must be the callback that moved the weights. "
            f"Found {type(weighting).__name__}."
        )
    return draw(TrainingRun(columns_of(history), weighting, validation_freq))
