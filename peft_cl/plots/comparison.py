"""Several methods in one picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..metrics import RunResults
from .curves import draw_curves, group_runs, label_ends
from .matrix import add_colour_bar, draw_matrix, mean_matrix, summarise
from .style import INK, new_figure, save, set_title


if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES_WIDTH = 6.8  # inches
MAX_TASKS_WITH_NUMBERS = 5  # a panel is small: more numbers could not be read


def plot_comparison(list_of_results: Sequence[RunResults], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw methods in one picture: the average accuracy curves left, each final accuracy matrix right.

    Seeds are merged as in `plot_average_accuracy`, and a matrix is the mean over the seeds. All matrices share one
    colour scale, so that they can be compared by eye.

    Args:
        list_of_results: The results of at least one run.
        path: Where to save the picture; its ending chooses the format (png, pdf, svg). `None`: not saved.

    Returns:
        `matplotlib.figure.Figure`: the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The list is empty, or two of its runs have the same method, settings and seed.

    Example:
        ```python
        >>> runs = [RunResults.load(f"out/{name}/results.json") for name in ("l2p", "dualprompt", "coda")]
        >>> figure = plot_comparison(runs, path="out/comparison.png")
        ```
    """
    lines = group_runs(list_of_results)
    columns = 1 if len(lines) <= 2 else math.ceil(math.sqrt(len(lines)))
    rows = math.ceil(len(lines) / columns)
    panel = 3.2 if len(lines) == 1 else 2.1 if len(lines) <= 6 else 1.75  # side of a matrix in inches
    width = columns * (panel + 0.2) + 0.4
    figure = new_figure(CURVES_WIDTH + width, max(4.6, rows * (panel + 0.6) + 0.4))
    left, right = figure.subfigures(1, 2, width_ratios=(CURVES_WIDTH, width))
    panels = list(right.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(lines) :]:
        axes.remove()
    matrices = [mean_matrix(line.matrices) for line in lines]
    for number, (line, matrix) in enumerate(zip(lines, matrices, strict=True)):
        axes = panels[number]
        image = draw_matrix(axes, matrix, numbers=len(matrix) <= MAX_TASKS_WITH_NUMBERS)
        axes.set(xticks=[], yticks=[], anchor="NW")
        below = summarise(line.matrices).replace("average accuracy", "acc.").replace("forgetting", "forg.")
        set_title(axes, line.label, below, width=panel, size=9, colour=line.ink)
        if number % columns == 0:
            axes.set_ylabel("After training task", fontsize=8, color=INK)
        if number + columns >= len(lines):
            axes.set_xlabel("Accuracy on task", fontsize=8, color=INK)
        if number == 0:
            add_colour_bar(axes, image, fontsize=7)
    axes = left.add_subplot()
    label_ends(figure, axes, draw_curves(axes, lines, list_of_results))  # last: labels need the finished layout
    save(figure, path)
    return figure
