"""The accuracy matrix as a heat map."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics import RunResults, final_average_accuracy, finished_tasks, forgetting
from .style import INK, MUTED, new_figure, save, set_title, short_name


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

UNMEASURED = "#eeeeee"
MAX_TASKS_WITH_NUMBERS = 20


def plot_accuracy_matrix(
    results_or_matrix: RunResults | Sequence[Sequence[float | None]] | np.ndarray,
    task_names: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw an accuracy matrix as a lower-triangular heat map.

    Row i holds the accuracies after training on task i, column j those on task j. Cells carry their number in % for up
    to 20 tasks; cells of tasks seen that were not measured are grey and empty.

    Args:
        results_or_matrix: The results of a run, or its accuracy matrix, (tasks, tasks) in 0..1 with NaN or None where
            nothing was measured. Only the lower triangle, the tasks seen, is drawn.
        task_names: One name per task. `None`: the names of the results, else `"task_0"`, `"task_1"`, ... If the names
            differ in a number at their end only, the axes show that number.
        path: Where to save the picture; its ending chooses the format (png, pdf, svg). `None`: not saved.

    Returns:
        `matplotlib.figure.Figure`: the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The matrix is not square, has values outside 0..1 or a finished row after an unfinished one, or
            `task_names` has another length.

    Example:
        ```python
        >>> figure = plot_accuracy_matrix(RunResults.load("out/results.json"), path="out/accuracy_matrix.png")
        >>> figure = plot_accuracy_matrix([[0.9, None], [0.7, 0.8]], task_names=["photo", "sketch"])
        ```
    """
    results = results_or_matrix if isinstance(results_or_matrix, RunResults) else None
    matrix = as_matrix(results_or_matrix if results is None else results.accuracy_matrix)
    if task_names is None:
        task_names = [f"task_{index}" for index in range(len(matrix))] if results is None else results.task_names
    if len(task_names) != len(matrix):
        raise ValueError(
            f"Got {len(task_names)} task names for an accuracy matrix of {len(matrix)} tasks; pass one name per task, "
            "or leave task_names out."
        )
    numbers = len(matrix) <= MAX_TASKS_WITH_NUMBERS
    side = max(3.2, len(matrix) * 0.42) if numbers else 7.0
    figure = new_figure(side + 0.9, side + 1.3)
    axes = figure.add_subplot()
    image = draw_matrix(axes, matrix, top=scale_top([matrix]), numbers=numbers)
    name_tasks(axes, task_names)
    add_colour_bar(axes, image, fontsize=8)
    heading = "Accuracy matrix" if results is None else f"{results.method} on {short_name(results.dataset)}"
    set_title(axes, heading, summarise(matrix[None]), width=side)
    save(figure, path)
    return figure


def as_matrix(values: Any) -> np.ndarray:
    """Return the accuracies as a float array, None as NaN; refuse what is no accuracy matrix (ValueError)."""
    finished_tasks(values)
    return np.array(values, dtype=float)


def mean_matrix(matrices: np.ndarray) -> np.ndarray:
    """Average over the seeds, (seeds, tasks, tasks) to (tasks, tasks).

    A cell that some seed has not measured is NaN: otherwise neighbouring cells would average over different seeds.
    """
    return matrices.mean(axis=0)


def summarise(matrices: np.ndarray) -> str:
    """Say the average accuracy and forgetting (means over the seeds) after the last task that every seed finished."""
    tasks = matrices.shape[1]
    seen = min(finished_tasks(matrix) for matrix in matrices)
    if seen == 0:
        return f"none of {tasks} tasks finished"
    finished = matrices[:, :seen, :seen]
    text = f"average accuracy {100 * np.mean([final_average_accuracy(matrix) for matrix in finished]):.1f} %"
    if seen > 1:
        text += f", forgetting {100 * np.mean([forgetting(matrix) for matrix in finished]):.1f} %"
    return text if seen == tasks else f"{text} (after {seen} of {tasks} tasks)"


def scale_top(matrices: Sequence[np.ndarray]) -> float:
    """Return the upper end of the colour scale: the highest accuracy drawn, rounded up to a full 10 %."""
    highest = max(np.tril(np.nan_to_num(matrix)).max() for matrix in matrices)
    return max(0.1, math.ceil(round(10 * highest, 6)) / 10)


def draw_matrix(axes: Axes, matrix: np.ndarray, top: float, numbers: bool) -> AxesImage:
    """Colour the lower triangle from 0 to `top`, with the numbers in % if wanted; return the image."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    size = len(matrix)
    seen = np.tril(np.ones_like(matrix, dtype=bool))
    measured = np.where(seen, matrix, np.nan)
    # One hue from light to dark keeps its order with any colour vision. Its palest part is left out, so that a low
    # accuracy does not look like an empty cell.
    colours = ListedColormap(colormaps["Blues"](np.linspace(0.06, 1, 256)))
    axes.imshow(np.where(seen & np.isnan(matrix), 1.0, np.nan), cmap=ListedColormap([UNMEASURED]))
    image = axes.imshow(measured, cmap=colours, vmin=0, vmax=top)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for edge in np.arange(size) + 0.5:  # white gaps between the cells, not above the diagonal
        axes.plot([-0.5, edge], [edge, edge], color="white", linewidth=1)
        axes.plot([edge, edge], [edge - 1, size - 0.5], color="white", linewidth=1)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    if numbers:
        fontsize = 10 if size <= 6 else 8 if size <= 10 else 7
        for row, column in np.argwhere(np.isfinite(measured)):
            value = matrix[row, column]
            colour = "white" if value > 0.6 * top else INK  # the darker or lighter one, whichever contrasts more
            text = f"{100 * value:.1f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=fontsize, color=colour)
    return image


def short_task_names(names: Sequence[str]) -> list[str]:
    """Leave out a start that all names share before their number ("task_"), where something is left of each."""
    starts = {re.sub(r"\d+$", "", name) for name in names}
    short = [name.removeprefix(min(starts)) for name in names] if len(starts) == 1 else list(names)
    return short if all(short) else list(names)


def places_of(count: int, most: int = 30) -> range:
    """Return which of so many rows of a picture carry a name: up to `most` all, of more each fifth, tenth, ..."""
    every = next((step for step in (1, 5, 10, 20, 50) if count <= (most if step == 1 else 12 * step)), 100)
    return range(0, count, every)


def name_tasks(axes: Axes, names: Sequence[str]) -> None:
    """Label rows and columns with the tasks."""
    labels, places = short_task_names(names), places_of(len(names))
    shown = [labels[place] for place in places]
    slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, labels)) > 4 else {}
    axes.set_xticks(places, shown, **slanted)
    axes.set_yticks(places, shown)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    axes.set_xlabel("Accuracy on task", fontsize=10, color=INK)
    axes.set_ylabel("After training task", fontsize=10, color=INK)


def add_colour_bar(axes: Axes, image: AxesImage, fontsize: float) -> None:
    """Put a small colour bar into the empty triangle above the diagonal (one task alone leaves no room)."""
    from matplotlib.ticker import PercentFormatter

    if image.get_array().shape[0] == 1:
        return
    top = image.get_clim()[1]
    bar = axes.figure.colorbar(
        image,
        cax=axes.inset_axes((0.6, 0.94, 0.36, 0.025)),
        orientation="horizontal",
        ticks=(0, top / 2, top),
        format=PercentFormatter(1, decimals=0, symbol=" %"),
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=fontsize, labelcolor=MUTED)
