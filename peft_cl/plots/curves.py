"""Average accuracy and forgetting over the tasks seen, a line per method."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..metrics import RunResults, finished_tasks
from ..metrics.matrix import average_accuracies, forgetting_so_far
from ..metrics.table import Group, differences, group_of
from ..text import percent, plain
from .matrix import as_matrix, mean_matrix, places_of, short_task_names, slanted
from .style import COLOURS, DASHES, INK, MARKERS, MUTED, new_figure, save, set_title, short_name, wrap


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Measure:
    """What a picture shows over the tasks seen, and how it says so."""

    title: str
    of: Callable[[np.ndarray], list[float]]  # an accuracy matrix to fractions of 1, one after each finished task
    first: int  # number of tasks seen from which on there is something to measure
    limits: tuple[float, float]  # ends of the axis, in %, where the values leave room beyond
    missing: str  # in place of the lines, if there is nothing to draw
    remark: str = ""

    def curves(self, matrices: np.ndarray) -> np.ndarray:
        """Values in % after each task: (seeds, tasks, tasks) to (seeds, tasks); NaN where there is nothing."""
        curves = np.full(matrices.shape[:2], np.nan)
        for curve, matrix in zip(curves, matrices, strict=True):
            values = self.of(matrix) if finished_tasks(matrix) else []
            curve[self.first - 1 : len(values)] = 100 * np.asarray(values[self.first - 1 :])
        return curves


AVERAGE_ACCURACY = Measure(
    title="Average accuracy over the tasks seen",
    of=average_accuracies,
    first=1,
    limits=(0, 101),
    missing="no task finished",
)
# `forgetting` is 0 for a single task by convention; a curve that begins there would show what nobody measured.
FORGETTING = Measure(
    title="Forgetting over the tasks seen",
    of=forgetting_so_far,
    first=2,
    limits=(-101, 101),
    missing="nothing to forget before the second task is finished",
    remark="; lower is better",
)


@dataclass(frozen=True)
class Line:
    """Runs that differ in their seed only, and how they are drawn."""

    label: str
    matrices: np.ndarray  # (seeds, tasks, tasks), accuracy in 0..1, NaN where not measured
    colour: str
    marker: str
    dash: str

    @property
    def ink(self) -> tuple[float, ...]:
        """The colour darkened for text: thin letters need more contrast than a line."""
        from matplotlib.colors import to_rgb

        return tuple(0.72 * part for part in to_rgb(self.colour))

    def name_with(self, value: float) -> str:
        """The text at the end of the curve, with its last value."""
        return wrap(f"{self.label}  {percent(value / 100)}", letters=26)


def plot_average_accuracy(list_of_results: Sequence[RunResults], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw the average accuracy over the tasks seen, after each task: a line per method and its settings.

    Runs that differ in their seed only are one line, their mean, with a band of one standard deviation over the seeds
    (n - 1 in the denominator). A method's runs on other data, backbones or scenarios, or with other hyperparameters,
    are lines of their own, whose labels say what differs.

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
        >>> figure = plot_average_accuracy(runs, path="out/average_accuracy.png")
        ```
    """
    return _plot([AVERAGE_ACCURACY], list_of_results, path)


def plot_forgetting(list_of_results: Sequence[RunResults], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw the forgetting after each task, from the second on: a line per method.

    It is the metric `forgetting` of the tasks seen so far: the mean drop of earlier tasks from their best accuracy.
    Seeds are merged, and settings told apart, as in `plot_average_accuracy`.

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
        >>> figure = plot_forgetting([RunResults.load("out")], path="out/forgetting.png")
        ```
    """
    return _plot([FORGETTING], list_of_results, path)


def plot_curves(list_of_results: Sequence[RunResults], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw average accuracy (above) and forgetting (below) over the tasks seen in one picture: a line per method.

    Args:
        list_of_results: The results of at least one run; what `plot_average_accuracy` says of them holds here.
        path: Where to save the picture; its ending chooses the format (png, pdf, svg). `None`: not saved.

    Returns:
        `matplotlib.figure.Figure`: the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The list is empty, or two of its runs have the same method, settings and seed.

    Example:
        ```python
        >>> runs = [RunResults.load(f"out/{name}") for name in ("l2p", "dualprompt", "coda")]
        >>> figure = plot_curves(runs, path="out/curves.png")
        ```
    """
    return _plot([AVERAGE_ACCURACY, FORGETTING], list_of_results, path)


def _plot(
    measures: Sequence[Measure], list_of_results: Sequence[RunResults], path: str | os.PathLike[str] | None
) -> Figure:
    """One set of axes a measure, one above the other; labels come last, they need the finished layout."""
    lines = group_runs(list_of_results)
    rows = sum(line.name_with(100).count("\n") + 1 for line in lines)
    figure = new_figure(7.2, len(measures) * max(4.2 if len(measures) == 1 else 3.4, 1.6 + 0.19 * rows))
    panels = figure.subplots(len(measures), 1, squeeze=False)[:, 0]
    ends = [draw_curves(axes, lines, list_of_results, measure) for axes, measure in zip(panels, measures, strict=True)]
    for axes, of_axes in zip(panels, ends, strict=True):
        label_ends(figure, axes, of_axes)
    save(figure, path)
    return figure


def group_runs(list_of_results: Sequence[RunResults]) -> list[Line]:
    """Make a line of the runs that differ in their seed only; what else differs among the lines is in their labels."""
    groups: dict[Group, dict[int, RunResults]] = {}
    for results in list_of_results:
        seeds = groups.setdefault(group_of(results), {})
        if results.seed in seeds:
            raise ValueError(
                f"Two results have the method {results.method!r}, the seed {results.seed} and the same settings, but "
                "a line is the mean over different seeds; leave one out, or give them different `method` names."
            )
        seeds[results.seed] = results
    if not groups:
        raise ValueError("The list of results is empty; pass the results of at least one run.")
    return [
        Line(
            label=label,
            matrices=np.stack([as_matrix(results.accuracy_matrix) for results in seeds.values()]),
            colour=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            dash=DASHES[number // len(COLOURS) % len(DASHES)],
        )
        for number, (label, seeds) in enumerate(zip(_labels(groups), groups.values(), strict=True))
    ]


def _labels(groups: Mapping[Group, Mapping[int, RunResults]]) -> list[str]:
    """Name each line by its method and what differs: what it was trained on, and if need be its settings."""
    firsts = [next(iter(seeds.values())) for seeds in groups.values()]
    methods, *contexts = zip(*((first.method, *_context(first)) for first in firsts), strict=True)
    differing = [names for names in contexts if len(set(names)) > 1]
    details = [", ".join(filter(None, parts)) for parts in zip(*differing, strict=True)] or [""] * len(firsts)
    known = list(zip(methods, details, strict=True))
    further = differences(known, list(groups))
    texts = [", ".join(filter(None, parts)) for parts in zip(details, further, strict=True)]
    methods = [plain(method, 60) for method in methods]
    return [f"{method} ({plain(text, 120)})" if text else method for method, text in zip(methods, texts, strict=True)]


def _context(results: RunResults) -> tuple[str, str, str, str]:
    count = len(results.task_names)
    tasks = f"{count} task{'s' if count > 1 else ''}"
    scenario = plain(results.scenario.get("name", ""), 40)
    return short_name(results.dataset), short_name(results.base_model), scenario, tasks


def _name_steps(axes: Axes, list_of_results: Sequence[RunResults]) -> None:
    """Label the tasks as the other pictures do: by their names, or numbers where the runs' tasks have other ones."""
    longest = max((results.task_names for results in list_of_results), key=len)
    alike = all(results.task_names == longest[: len(results.task_names)] for results in list_of_results)
    labels = short_task_names(longest) if alike else [str(number) for number in range(len(longest))]
    places = places_of(len(longest), 20)
    axes.set_xticks([place + 1 for place in places], [labels[place] for place in places], **slanted(labels))
    axes.set_xlabel("After training task", fontsize=10, color=INK)


def draw_curves(
    axes: Axes, lines: Sequence[Line], list_of_results: Sequence[RunResults], measure: Measure = AVERAGE_ACCURACY
) -> list[tuple[int, float, Line]]:
    """Draw each line over the tasks seen; return its end (tasks seen, value in %), where `label_ends` names it."""
    ends = []
    for line in lines:
        curves = measure.curves(line.matrices)
        mean = mean_matrix(curves)
        steps = np.arange(1, len(mean) + 1)
        if len(curves) > 1:
            band = curves.std(axis=0, ddof=1)
            axes.fill_between(steps, mean - band, mean + band, color=line.colour, alpha=0.15, linewidth=0)
        look = {"color": line.colour, "marker": line.marker, "linestyle": line.dash, "linewidth": 1.8}
        axes.plot(steps, mean, markersize=5, markeredgecolor="white", markeredgewidth=0.6, label=line.label, **look)
        measured = np.flatnonzero(np.isfinite(mean))
        if len(measured):
            ends.append((steps[measured[-1]], mean[measured[-1]], line))
    most = max(line.matrices.shape[1] for line in lines)
    axes.set_xlim(0.7, most + (0.15 if most > 1 else 0.3))
    _name_steps(axes, list_of_results)
    low, high = axes.get_ylim() if ends else (0, 100)
    axes.set_ylim(max(low, measure.limits[0]), min(high, measure.limits[1]))
    if not ends:
        axes.text(0.5, 0.5, measure.missing, transform=axes.transAxes, ha="center", color=MUTED)
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#aaaaaa")
    datasets = ", ".join(dict.fromkeys(short_name(results.dataset) for results in list_of_results))
    set_title(axes, measure.title, datasets + measure.remark + _about_seeds(lines), width=6)
    return ends


def _about_seeds(lines: Sequence[Line]) -> str:
    """Say over how many seeds the lines are means, and what their bands are; nothing where there is one seed."""
    counts = {len(line.matrices) for line in lines}
    if max(counts) == 1:
        return ""
    count = f"{max(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"; mean of {count} seeds, band: one standard deviation"


def label_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[int, float, Line]]) -> None:
    """Write name and last value to the right of each line's end, moved apart where they would overlap."""
    ends = sorted(ends, key=lambda end: end[1])
    labels = [line.name_with(value) for _, value, line in ends]
    figure.draw_without_rendering()  # the height of the axes is known only once the figure is laid out
    low, high = axes.get_ylim()
    room = axes.get_window_extent().height * 72 / figure.dpi  # in points, 1/72 inch
    heights = [12 * label.count("\n") + 13 for label in labels]
    places = _move_apart([(value - low) / (high - low) * room for _, value, _ in ends], heights, room)
    for (step, value, line), label, place in zip(ends, labels, places, strict=True):
        axes.annotate(
            label,
            (step, value),
            (1.03, place),
            textcoords=("axes fraction", "axes points"),
            color=line.ink,
            fontsize=9,
            fontweight="bold",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": line.colour,
                "linewidth": 0.6,
                "alpha": 0.7,
                "shrinkA": 2,
                "shrinkB": 4,
                "relpos": (0, 0.5),
                "patchA": None,
            },
            annotation_clip=False,
        )


def _move_apart(values: Sequence[float], heights: Sequence[float], room: float) -> list[float]:
    """Return the middles nearest to the ascending values (least squares) at which labels so high do not overlap.

    They stay within 0 and `room` if they fit. Less the heights stacked up to them, the middles must not descend:
    isotonic regression, by merging neighbours that do.
    """
    stacked = np.cumsum(heights) - np.asarray(heights) / 2
    blocks: list[list[float]] = []
    for level in np.asarray(values) - stacked:
        blocks.append([level])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1].extend(last)
    levels = np.array([np.mean(block) for block in blocks for _ in block])
    return (np.clip(levels, 0, max(0, room - sum(heights))) + stacked).tolist()
