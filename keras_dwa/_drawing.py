"""Draws a training run. Needs matplotlib, which is optional."""

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from keras_dwa._history import TrainingRun
from keras_dwa._ledger import Vector

# From Okabe and Ito's palette for colour-blind readers.
BLUE, VERMILION = "#0072B2", "#D55E00"


class InlineFigure(Figure):
    """A figure that notebooks show, although pyplot does not manage it."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


def draw(run: TrainingRun) -> Figure:
    """The figure that `plot_history` describes."""
    heights = [1.5] * run.has_totals + [min(1.5, max(0.5, 6 / len(run.names)))] * len(run.names)
    columns = 3 if run.windows else 2
    size = (1 + 3 * columns + 0.07 * max(map(len, run.names)), 1 + 1.1 * sum(heights))
    figure = InlineFigure(size, layout=ConstrainedLayoutEngine(h_pad=0.02))
    grid = (len(heights), columns)
    panels = figure.subplots(*grid, squeeze=False, sharex="col", height_ratios=heights)
    if run.has_totals:
        _draw_totals(panels[0], run)
    _draw_outputs(panels[-len(run.names) :], run)
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        panel.locator_params(axis="x", integer=True, min_n_ticks=1)
        panel.tick_params(labelsize="small")
    lines = {line.get_label(): line for panel in figure.axes for line in panel.lines}
    figure.legend(handles=lines.values(), loc="outside upper right", ncols=4, frameon=False)
    return figure


def _draw_totals(panels: NDArray[Any], run: TrainingRun) -> None:
    """Draws the loss under the base weights in the first panel of a row."""
    _draw_losses(panels[0], "base_loss", run.epochs, *run.totals)
    _spread_out(panels[:1])
    panels[0].set_xlabel("epoch")
    panels[0].tick_params(labelbottom=True)
    for empty in panels[1:]:
        empty.remove()


def _draw_outputs(panels: NDArray[Any], run: TrainingRun) -> None:
    """Draws a row of panels for each output."""
    _share_y(panels[:, 0])
    _share_y(panels[:, 1:].ravel())
    for (loss, weight, *of_windows), name in zip(panels, run.names, strict=True):
        _draw_losses(loss, name, run.epochs, *run.losses(name))
        _draw_weights(weight, run, run.epochs, run.weights(name))
        for panel in of_windows:
            _draw_weights(panel, run, *run.window_weights(name), drawstyle="steps-post")
    _spread_out(panels[:, 0])
    _widen(panels[0, 1])
    panels[0, 0].set_xlim(panels[0, 1].get_xlim())  # The last losses may be NaN.
    titles = ["loss (first epoch = 1)", run.weight_title, run.weight_title]
    units = ["epoch", "epoch", f"batch (latest {len(run.windows)} windows)"]
    for column, title, unit in zip(panels.T, titles, units, strict=False):
        column[0].set_title(title, fontsize="medium")
        column[-1].set_xlabel(unit)


def _share_y(panels: NDArray[Any]) -> None:
    for panel in panels[1:]:
        panel.sharey(panels[0])


def _draw_losses(
    panel: Axes, name: str, epochs: Vector, training: Vector, validation: Vector
) -> None:
    _draw(panel, epochs, training, color=BLUE, label="training")
    had = np.isfinite(validation)
    if had.any():
        # Without gaps for epochs that were not validated.
        style = {"color": VERMILION, "label": "validation", "linestyle": "--"}
        _draw(panel, epochs[had], validation[had], **style)
    panel.set_ylabel(name, rotation="horizontal", ha="right", va="center", parse_math=False)


def _draw_weights(panel: Axes, run: TrainingRun, x: Vector, weights: Vector, **style: Any) -> None:
    _draw(panel, x, weights, color="black", label="weight", **style)
    panel.axhline(1, color="0.5", linestyle=":", label=run.uniform)
    panel.ticklabel_format(axis="y", useOffset=False)


def _draw(panel: Axes, x: Vector, y: Vector, **style: Any) -> None:
    # With points, if there is room for them.
    panel.plot(x, y, marker="." if len(x) <= 20 else None, **style)


def _widen(panel: Axes) -> None:
    """Makes an axis of weights at least 20% high, so that a change of 1% looks like one."""
    low, high = panel.get_ylim()
    lacks = max(0.0, 0.2 * max(abs(low), abs(high)) - (high - low))
    panel.set_ylim(low - lacks / 2, high + lacks / 2)


def _spread_out(panels: NDArray[Any]) -> None:
    """Makes an axis of losses logarithmic if it has at least two powers of 10 as ticks."""
    losses = np.concatenate([line.get_ydata() for panel in panels for line in panel.lines])
    losses = losses[np.isfinite(losses)]
    if len(losses) and losses.min() > 0:
        first, last = np.ceil(np.log10(losses.min())), np.floor(np.log10(losses.max()))
        if first < last:
            panels[0].set_yscale("log")
            panels[0].yaxis.set_major_formatter("{x:g}")
