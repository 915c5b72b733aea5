"""Reliability diagrams: how often images are predicted right, by how sure the model is of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from ..reliability.calibration import Calibration, CalibrationMeasures
from ..text import counted, percent, plain, rounded
from .style import COLOURS, INK, MUTED, new_figure, save, set_title, wrap


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 3.3  # inches of a diagram


def plot_reliability(
    calibration: Calibration,
    heading: str = "Reliability",
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the reliability diagram before temperature scaling and after it, side by side.

    A bar is the accuracy of the images whose confidence (the probability of the predicted class) lies in its bin. On
    the diagonal, accuracy and confidence are the same; a bar below it says that the model is too sure. Under each
    diagram stands how many images each bin has: a bar of few images says little.

    Args:
        calibration: What `calibrate` returned, or `Calibration.from_dict(results.calibration[-1])` of a run.
        heading: What stands above the picture.
        path: Where to save the picture; its ending chooses the format (png, pdf, svg). `None`: not saved.

    Returns:
        `matplotlib.figure.Figure`: the picture.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        ```python
        >>> figure = plot_reliability(Calibration.load("out/calibration.json"), path="out/reliability.png")
        ```
    """
    figure = new_figure(2 * SIDE + 1.2, SIDE + 2.4)
    grid = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    after = rounded(calibration.temperature, 2)
    parts = (("Before (temperature 1)", calibration.before), (f"After (temperature {after})", calibration.after))
    for column, (title, measures) in enumerate(parts):
        _draw_accuracies(grid[0, column], measures)
        _draw_counts(grid[1, column], measures)
        below = f"calibration error {percent(measures.ece)} %, NLL {rounded(measures.nll, 3)}"
        set_title(grid[0, column], title, below, width=SIDE, size=10)
    grid[0, 0].set_ylabel("Accuracy", fontsize=10, color=INK)
    grid[1, 0].set_ylabel("Images", fontsize=10, color=INK)
    figure.align_ylabels(grid[:, 0])
    figure.suptitle(wrap(plain(heading, 120), 70), x=0.02, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.supxlabel(_remark(calibration), x=0.02, ha="left", fontsize=8.5, color=MUTED)
    save(figure, path)
    return figure


def _remark(calibration: Calibration) -> str:
    """Say what was measured: images, and by which temperature where that is another than the one fitted on all."""
    after = calibration.after
    text = f"{counted(after.images, 'image')}, of which {percent(after.accuracy)} % are predicted right"
    if calibration.held_out:
        text += f"; the temperature measured was fitted on the other {calibration.images - after.images:,}"
    return text


def _draw_accuracies(axes: Axes, measures: CalibrationMeasures) -> None:
    """Draw the diagonal, and a bar for each bin that has images."""
    places, width = _bins_of(measures)
    accuracy = [np.nan if value is None else value for value in measures.bins.accuracy]
    axes.bar(places, accuracy, width=0.92 * width, color=COLOURS[5])
    axes.plot((0, 1), (0, 1), linestyle="--", linewidth=1, color=INK)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_yticks((0, 0.5, 1), ("0 %", "50 %", "100 %"))
    _plain(axes)


def _draw_counts(axes: Axes, measures: CalibrationMeasures) -> None:
    places, width = _bins_of(measures)
    axes.bar(places, measures.bins.count, width=0.92 * width, color="#aaaaaa")
    axes.locator_params(axis="y", nbins=3, integer=True)
    axes.set_xticks((0, 0.5, 1), ("0 %", "50 %", "100 %"))
    axes.set_xlabel("Confidence", fontsize=10, color=INK)
    _plain(axes)


def _bins_of(measures: CalibrationMeasures) -> tuple[np.ndarray, float]:
    """The middles of the bins, and their width."""
    bins = len(measures.bins.count)
    return (np.arange(bins) + 0.5) / bins, 1 / bins


def _plain(axes: Axes) -> None:
    axes.tick_params(length=0, labelsize=8.5, labelcolor=MUTED)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#aaaaaa")
