"""The accuracy matrix as a heat map."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics import RunResults, final_average_accuracy, finished_tasks, forgetting
from ..text import percent, plain
from .style import INK, MUTED, new_figure, save, set_title, short_name


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

UNMEASURED = "#eeeeee"
MAX_TASKS_WITH_NUMBERS = 20
MAX_TASKS_WITH_GAPS = 100
MAX_LETTERS = 28  # of a name at an axis


def plot_accuracy_matrix(
    results_or_matrix: RunResults | Sequence[Sequence[float | None]] | np.ndarray,
    task_names: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw an accuracy matrix as a lower-triangular heat map.

    Row i holds the accuracies after training on task i, column j those on task j, on a scale from 0 to 100 %. Cells
    carry their number in % for up to 20 tasks; cells of tasks seen that were not measured are grey and empty. Results
    that were measured ahead (`measure_ahead`) have the triangle above the diagonal too, and a line of what was right
    before the first task. Where tasks have numbers alone, the rows name their classes as well.

    Args:
        results_or_matrix: The results of a run, or its accuracy matrix, (tasks, tasks) in 0..1 with NaN or None where
            nothing was measured. Of a matrix, only the lower triangle, the tasks seen, is drawn.
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
    ahead = None if results is None else results.baseline
    classes = classes_of_tasks(results, task_names)
    longest = max(map(len, task_labels(task_names, classes)))
    figure = new_figure(side + (0.9 if ahead is None else 1.5) + 0.08 * longest, side + 1.3)
    axes = figure.add_subplot()
    image = draw_matrix(axes, matrix, numbers=numbers, ahead=ahead)
    name_tasks(axes, task_names, classes, ahead is not None)
    add_colour_bar(axes, image, fontsize=8, inside=ahead is None)
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
    text = f"average accuracy {percent(np.mean([final_average_accuracy(matrix) for matrix in finished]))} %"
    if seen > 1:
        text += f", forgetting {percent(np.mean([forgetting(matrix) for matrix in finished]))} %"
    return text if seen == tasks else f"{text} (after {seen} of {tasks} tasks)"


def draw_matrix(axes: Axes, matrix: np.ndarray, numbers: bool, ahead: Sequence[float] | None = None) -> AxesImage:
    """Colour the cells from 0 to 100 %, with the numbers in % if wanted; return the image.

    Args:
        axes: Where to draw; row i of the matrix is at the height i.
        matrix: The accuracies.
        numbers: Whether cells carry their numbers.
        ahead: Accuracies before the first task, of a run that was measured ahead: at the height -1. `None`: of the
            matrix, the lower triangle alone is drawn.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    size = len(matrix)
    seen = np.tril(np.ones_like(matrix, dtype=bool))
    rows = np.where(seen, matrix, np.nan) if ahead is None else np.vstack([np.asarray(ahead, dtype=float), matrix])
    first = size - len(rows)  # the height of the first of these rows
    # One hue from light to dark keeps its order with any colour vision. Its palest part is left out, so that a low
    # accuracy does not look like an empty cell.
    colours = ListedColormap(colormaps["Blues"](np.linspace(0.06, 1, 256)))
    axes.imshow(np.where(seen & np.isnan(matrix), 1.0, np.nan), cmap=ListedColormap([UNMEASURED]))
    image = axes.imshow(rows, cmap=colours, vmin=0, vmax=1, extent=(-0.5, size - 0.5, size - 0.5, first - 0.5))
    for spine in axes.spines.values():
        spine.set_visible(False)
    if size <= MAX_TASKS_WITH_GAPS:  # white gaps between the cells, not above the diagonal
        edges = np.arange(size) + 0.5
        axes.hlines(edges, -0.5, edges, color="white", linewidth=1)
        axes.vlines(edges, edges - 1, size - 0.5, color="white", linewidth=1)
    if ahead is not None:  # what had been learnt is below the stairs
        stairs = np.repeat(np.arange(size + 1) - 0.5, 2)
        axes.plot(stairs[:-1], stairs[1:] - 1, color=INK, linewidth=1)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, first - 0.5))
    if numbers:
        fontsize = 10 if size <= 6 else 8 if size <= 10 else 7
        for row, column in np.argwhere(np.isfinite(rows)):
            value = rows[row, column]
            colour = "white" if value > 0.6 else INK  # the darker or lighter one, whichever contrasts more
            text = percent(value)
            axes.text(column, row + first, text, ha="center", va="center", fontsize=fontsize, color=colour)
    return image


def short_task_names(names: Sequence[str]) -> list[str]:
    """Leave out a start that all names share before their number ("task_"), where something is left of each."""
    names = [plain(name, MAX_LETTERS) for name in names]
    starts = {re.sub(r"\d+$", "", name) for name in names}
    short = [name.removeprefix(min(starts)) for name in names] if len(starts) == 1 else list(names)
    return short if all(short) else list(names)


def places_of(count: int, most: int = 30) -> range:
    """Return which of so many rows of a picture carry a name: up to `most` all, of more each fifth, tenth, ..."""
    every = next((step for step in (1, 5, 10, 20, 50) if count <= (most if step == 1 else 12 * step)), 100)
    return range(0, count, every)


def classes_of_tasks(results: RunResults | None, names: Sequence[str]) -> list[str] | None:
    """Return the classes of each task as one text, where tasks have numbers in the place of names and the record says
    which classes are whose; otherwise `None`."""
    scenario = {} if results is None else results.scenario
    classes, counts = scenario.get("class_order"), scenario.get("classes_per_task")
    if not (isinstance(classes, list) and isinstance(counts, list)) or not all(
        re.fullmatch(r"task_\d+", n) for n in names
    ):
        return None
    if sum(counts) != len(classes) or len(counts) < len(names):  # tasks that share classes
        return None
    ends = np.cumsum(counts)
    return [
        ", ".join(plain(name, MAX_LETTERS) for name in classes[end - count : end][:MAX_LETTERS])
        for end, count in list(zip(ends, counts, strict=True))[: len(names)]
    ]


def task_labels(names: Sequence[str], classes: Sequence[str] | None = None) -> list[str]:
    """Return the tasks' names for an axis, with their classes where these are given."""
    short = short_task_names(names)
    if classes is None:
        return short
    return [plain(f"{name}: {of_task}", MAX_LETTERS) for name, of_task in zip(short, classes, strict=True)]


def name_tasks(axes: Axes, names: Sequence[str], classes: Sequence[str] | None = None, is_ahead: bool = False) -> None:
    """Label rows and columns with the tasks, the rows with their classes too where these are given."""
    labels, places = short_task_names(names), places_of(len(names))
    shown = [labels[place] for place in places]
    axes.set_xticks(places, shown, **slanted(labels))
    rows = task_labels(names, classes)
    shown = [*(["before"] if is_ahead else []), *(rows[place] for place in places)]
    axes.set_yticks([*([-1] if is_ahead else []), *places], shown)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    axes.set_xlabel("Accuracy on task", fontsize=10, color=INK)
    axes.set_ylabel("After training task", fontsize=10, color=INK)


def slanted(labels: Sequence[str]) -> dict[str, Any]:
    """Return how labels under an axis are turned: those that would not fit side by side."""
    return {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, labels)) > 4 else {}


def add_colour_bar(axes: Axes, image: AxesImage, fontsize: float, inside: bool = True) -> None:
    """Put a small colour bar into the empty triangle above the diagonal (one task alone leaves no room), or beside."""
    from matplotlib.ticker import PercentFormatter

    if inside and image.get_array().shape[0] == 1:
        return
    place = (
        {"cax": axes.inset_axes((0.6, 0.94, 0.36, 0.025)), "orientation": "horizontal"}
        if inside
        else {"ax": axes, "aspect": 40, "pad": 0.02, "shrink": 0.8}
    )
    bar = axes.figure.colorbar(image, ticks=(0, 0.5, 1), format=PercentFormatter(1, decimals=0, symbol=" %"), **place)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=fontsize, labelcolor=MUTED)
