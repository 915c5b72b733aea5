"""How alike a pool's keys are, as heat maps of their cosines."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..text import plain, rounded
from .matrix import MAX_LETTERS, MAX_TASKS_WITH_GAPS, UNMEASURED, places_of, short_task_names, slanted
from .style import INK, MUTED, new_figure, save, set_title


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MAX_KEYS_WITH_NUMBERS = 12


def plot_key_similarity(
    keys: Sequence[Any] | np.ndarray,
    rows_of_tasks: Sequence[int] | None = None,
    set_names: Sequence[str] | None = None,
    heading: str = "Key similarity",
    path: str | os.PathLike[str] | None = None,
    task_names: Sequence[str] | None = None,
) -> Figure:
    """Draw the cosine of each two keys of a pool: a heat map for each set of keys, all on the scale from -1 to 1.

    Near 1, two keys attract the same images, so that their prompts can hardly be told apart; near 0, they stand for
    different ones. A single set of up to 12 keys carries the numbers. A key of zeros has no direction, nor has one
    that is not finite: their cells are grey.

    Args:
        keys: The keys, (rows, D), or (sets, rows, D) where each layer has its own.
        rows_of_tasks: Number of rows that each task brought, in order; they add up to all rows. Their bounds are
            drawn, and the axes number the tasks. `None`: not known, the axes number the rows.
        set_names: One name per set. `None`: `"set 0"`, `"set 1"`, ...; a single set needs none.
        heading: What stands above the picture.
        path: Where to save the picture; its ending chooses the format (png, pdf, svg). `None`: not saved.
        task_names: One name per task of `rows_of_tasks`, for the axes. `None`: its number, from 0.

    Returns:
        `matplotlib.figure.Figure`: the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The keys have another number of dimensions or an empty one, or `rows_of_tasks` or `set_names` does
            not fit them.

    Example:
        ```python
        >>> figure = plot_key_similarity([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], rows_of_tasks=[1, 2])
        ```
    """
    cosines = _cosines(keys)
    sets, rows = cosines.shape[:2]
    if rows_of_tasks is not None and (min(rows_of_tasks, default=0) < 1 or sum(rows_of_tasks) != rows):
        raise ValueError(
            f"rows_of_tasks is {list(rows_of_tasks)}, but there are {rows} keys; give how many of them each task "
            "brought, from 1, in order, or None."
        )
    labels = _labels_of(rows_of_tasks or (), task_names)
    names = [f"set {index}" for index in range(sets)] if set_names is None else list(set_names)
    if len(names) != sets:
        raise ValueError(
            f"Got {len(names)} set names for {sets} sets of keys; pass one name per set, or leave it out."
        )
    columns = 1 if sets == 1 else min(sets, 3) if sets <= 6 else 4
    lines = math.ceil(sets / columns)
    side = 2.5 if sets > 1 else 4.4
    figure = new_figure(columns * (side + 0.25) + 1.2, lines * (side + 0.75) + 0.7)
    grid = figure.subplots(lines, columns, squeeze=False)
    panels = list(grid.flat)
    for axes in panels[sets:]:
        axes.remove()
    for number, (axes, cosine) in enumerate(zip(panels, cosines, strict=False)):
        image = _draw_cosines(axes, cosine, numbers=sets == 1 and rows <= MAX_KEYS_WITH_NUMBERS)
        what = _name_rows(axes, rows, rows_of_tasks, labels, most=30 if sets == 1 else 12)
        if number % columns == 0:
            axes.set_ylabel(what, fontsize=10, color=INK)
        if number + columns >= sets:
            axes.set_xlabel(what, fontsize=10, color=INK)
        if sets > 1:
            set_title(axes, plain(names[number], MAX_LETTERS), _summarise(cosine), width=side, size=10)
    if sets > 1:
        figure.suptitle(plain(heading, 80), x=0.02, ha="left", fontsize=12, fontweight="bold", color=INK)
    else:
        set_title(panels[0], heading, _summarise(cosines[0]), width=side)
    _add_scale(panels[columns - 1], image)
    save(figure, path)
    return figure


def _labels_of(rows_of_tasks: Sequence[int], task_names: Sequence[str] | None) -> list[str]:
    if task_names is None:
        return [str(task) for task in range(len(rows_of_tasks))]
    if len(task_names) != len(rows_of_tasks):
        raise ValueError(
            f"Got {len(task_names)} task names for keys of {len(rows_of_tasks)} tasks; pass one name for each "
            "entry of rows_of_tasks, or leave task_names out."
        )
    return short_task_names(task_names)


def _cosines(keys: Sequence[Any] | np.ndarray) -> np.ndarray:
    """(rows, D) or (sets, rows, D) to (sets, rows, rows); NaN where a key has no direction."""
    array = np.asarray(keys, dtype=float)
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(
            f"Keys have the shape {array.shape}, but must have (rows, D) or (sets, rows, D), at least one of each."
        )
    array = array.reshape(-1, *array.shape[-2:])
    array = np.where(np.isfinite(array).all(axis=-1, keepdims=True), array, np.nan)
    lengths = np.linalg.norm(array, axis=-1, keepdims=True)
    units = array / np.where(lengths > 0, lengths, np.nan)
    return np.clip(units @ units.transpose(0, 2, 1), -1, 1)


def _draw_cosines(axes: Axes, cosine: np.ndarray, numbers: bool) -> AxesImage:
    """Colour the cosines from -1 to 1, with the numbers if wanted; return the image."""
    from matplotlib import colormaps

    # Two hues that meet in white at 0: what is drawn strong is far from it, whatever its sign.
    colours = colormaps["RdBu_r"].with_extremes(bad=UNMEASURED)
    image = axes.imshow(cosine, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
    for spine in axes.spines.values():
        spine.set_visible(False)
    if numbers:
        for row, column in np.argwhere(np.isfinite(cosine)):
            value = cosine[row, column]
            colour = "white" if abs(value) > 0.65 else INK
            axes.text(column, row, rounded(value, 2), ha="center", va="center", fontsize=7, color=colour)
    return image


def _name_rows(axes: Axes, rows: int, rows_of_tasks: Sequence[int] | None, labels: Sequence[str], most: int) -> str:
    """Label the axes with the tasks, where they are known, or the rows; return what the labels are."""
    if rows_of_tasks is None:
        axes.set_xticks(places_of(rows, most))
        axes.set_yticks(places_of(rows, most))
    else:
        ends = np.cumsum(rows_of_tasks)
        middles = ends - np.asarray(rows_of_tasks) / 2 - 0.5
        shown = places_of(len(rows_of_tasks), most)
        axes.set_xticks(middles[shown], [labels[task] for task in shown], **slanted(labels))
        axes.set_yticks(middles[shown], [labels[task] for task in shown])
        if max(rows_of_tasks) > 1 and len(rows_of_tasks) <= MAX_TASKS_WITH_GAPS:  # else each row is a task's
            for end in ends[:-1] - 0.5:
                axes.axhline(end, color=MUTED, linewidth=0.5)
                axes.axvline(end, color=MUTED, linewidth=0.5)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    return "Key, row of the pool" if rows_of_tasks is None else "Keys of task"


def _add_scale(axes: Axes, image: AxesImage) -> None:
    """Put the colour bar, one for all panels, to the right of these axes, as high as they are."""
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.04, 0, 0.04, 1)), ticks=(-1, 0, 1))
    bar.set_label("Cosine", fontsize=9, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=MUTED)


def _summarise(cosine: np.ndarray) -> str:
    """Say between which bounds the cosines of two different keys are."""
    others = cosine[~np.eye(len(cosine), dtype=bool) & np.isfinite(cosine)]
    if not others.size:
        return "no two keys to compare"
    low, high, mean = (rounded(value, 2) for value in (others.min(), others.max(), others.mean()))
    return f"two keys: {low} to {high}, mean {mean}".replace("-", "\u2212")
