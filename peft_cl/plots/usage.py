"""Which rows of the pool serve which tasks, as a heat map with each task's entropy beside it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..metrics import RunResults, usage_entropy, usage_overlap, usage_shares
from ..text import percent, rounded
from .matrix import MAX_TASKS_WITH_GAPS, classes_of_tasks, places_of, task_labels
from .style import COLOURS, INK, MUTED, new_figure, save, set_title, short_name


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MAX_ROWS_WITH_NUMBERS = 12
MAX_TASKS_WITH_NUMBERS = 20
BARS_WIDTH = 1.5  # inches


def plot_prompt_usage(
    results_or_counts: RunResults | Sequence[Sequence[float]] | np.ndarray,
    task_names: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw how often each row of the pool is chosen for each task's test images, and how evenly.

    The heat map has a line per task and a column per row of the pool; a cell is the row's share of the task's choices,
    in numbers (%) for up to 12 rows and 20 tasks. The bars beside it are each task's entropy (`usage_entropy`), on an
    axis that ends where all rows would be chosen equally often.

    Args:
        results_or_counts: The results of a run whose `prompt_usage` was counted, or counts, (tasks, rows).
        task_names: One name per task of the counts. `None`: the names of the results' finished tasks, else `"task_0"`,
            `"task_1"`, ... If the names differ in a number at their end only, the axes show that number.
        path: Where to save the picture; its ending chooses the format (png, pdf, svg). `None`: not saved.

    Returns:
        `matplotlib.figure.Figure`: the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The results have no counts, the counts are none (`usage_shares`), or `task_names` has another
            length.

    Example:
        ```python
        >>> figure = plot_prompt_usage(RunResults.load("out"), path="out/prompt_usage.png")
        >>> figure = plot_prompt_usage([[30, 10, 0], [5, 5, 30]], task_names=["photo", "sketch"])
        ```
    """
    results = results_or_counts if isinstance(results_or_counts, RunResults) else None
    counts = results_or_counts if results is None else results.prompt_usage
    if counts is None:
        raise ValueError(
            f"The results of {results.method!r} have no prompt_usage: all rows take part in every image, or nothing "
            "was counted. Draw the results of a run that chooses rows, or give counts."
        )
    shares = usage_shares(counts)
    tasks, rows = shares.shape
    if task_names is None:
        task_names = [f"task_{index}" for index in range(tasks)] if results is None else results.task_names[:tasks]
    if len(task_names) != tasks:
        raise ValueError(
            f"Got {len(task_names)} task names for counts of {tasks} tasks; pass one name per task, or leave "
            "task_names out."
        )
    width = max(3.6, rows * 0.45) if rows <= MAX_ROWS_WITH_NUMBERS else 6.0
    figure = new_figure(width + BARS_WIDTH + 1.2, min(max(2.2, tasks * 0.38), 8.0) + 1.5)
    axes, bars = figure.subplots(1, 2, sharey=True, width_ratios=(width, BARS_WIDTH))
    image = _draw_shares(axes, shares)
    places, labels = places_of(tasks), task_labels(task_names, classes_of_tasks(results, task_names))
    axes.set_yticks(places, [labels[place] for place in places])
    axes.set_ylabel("Test images of task", fontsize=10, color=INK)
    _draw_entropy(bars, usage_entropy(counts), rows)
    _add_scale(figure, [axes, bars], image)
    heading = "Prompt usage" if results is None else f"{results.method} on {short_name(results.dataset)}: prompt usage"
    set_title(axes, heading, _summarise(counts), width=width)
    save(figure, path)
    return figure


def _draw_shares(axes: Axes, shares: np.ndarray) -> AxesImage:
    """Colour the shares from 0 to the highest, with the numbers in % where they can be read."""
    tasks, rows = shares.shape
    top = shares.max()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    for spine in axes.spines.values():
        spine.set_visible(False)
    if tasks <= MAX_TASKS_WITH_GAPS:  # each task's line is read on its own
        for edge in np.arange(tasks - 1) + 0.5:
            axes.axhline(edge, color="white", linewidth=1.5)
    if rows <= MAX_ROWS_WITH_NUMBERS and tasks <= MAX_TASKS_WITH_NUMBERS:
        for task, row in np.ndindex(shares.shape):
            colour = "white" if shares[task, row] > 0.6 * top else INK
            text = percent(shares[task, row], 0)
            axes.text(row, task, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(places_of(rows))
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    axes.set_xlabel("Row of the pool", fontsize=10, color=INK)
    return image


def _draw_entropy(axes: Axes, entropy: np.ndarray, rows: int) -> None:
    """Draw a bar per task, up to what equal shares of all rows would give."""
    most = math.log2(rows) if rows > 1 else 1.0
    axes.barh(np.arange(len(entropy)), entropy, height=0.6, color=COLOURS[5])
    if len(entropy) <= MAX_TASKS_WITH_NUMBERS:
        for task, value in enumerate(entropy):
            axes.text(0.04 * most, task, rounded(value, 1), ha="left", va="center", fontsize=8, color=INK)
    axes.set_xlim(0, most)
    axes.set_xticks([0, most], ["0", f"{most:.3g}"])
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK, labelleft=False)
    axes.set_xlabel("Entropy (bits)", fontsize=10, color=INK)
    for side in ("top", "bottom"):
        axes.spines[side].set_visible(False)
    for side in ("left", "right"):  # the right one is where all rows are chosen equally often
        axes.spines[side].set_color("#aaaaaa")


def _add_scale(figure: Figure, panels: Sequence[Axes], image: AxesImage) -> None:
    """Put the colour bar of the shares at the right."""
    from matplotlib.ticker import PercentFormatter

    top = image.get_clim()[1]
    decimals = 0 if top >= 0.2 else 1
    bar = figure.colorbar(
        image,
        ax=panels,
        ticks=(0, top / 2, top),
        format=PercentFormatter(1, decimals=decimals, symbol=" %"),
        aspect=30,
        pad=0.02,
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=MUTED)


def _summarise(counts: Sequence[Sequence[float]] | np.ndarray) -> str:
    """Say what the cells are, and how much two tasks have in common."""
    text = "share of each row in the choices for a task's test images"
    overlap = usage_overlap(counts)
    if len(overlap) == 1:
        return text
    others = overlap[~np.eye(len(overlap), dtype=bool)]
    return f"{text}; two tasks have {percent(others.mean(), 0)} % in common on average"
