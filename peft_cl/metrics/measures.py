"""What a comparison of runs may show of each, as columns of a table by name: accuracies, costs, use of prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ..text import duration, percent, size
from .matrix import finished_tasks
from .results import RunResults
from .usage import selection_diversity, usage_density


#: In place of what was not measured.
NOTHING = "–"


@dataclass(frozen=True)
class Beside:
    """What a run is measured against: runs of other methods on the same tasks with the same seed, if there are such.

    Attributes:
        reference: a run that kept all data, for intransigence.
        relative_to: the run whose time and operations are 100 %.
        category: the kind of method, as the suite says it.
    """

    reference: RunResults | None = None
    relative_to: RunResults | None = None
    category: str | None = None


@dataclass(frozen=True)
class Measure:
    """A column.

    Attributes:
        title: its head.
        of: a run, and what it is measured against, to a number, a tuple of numbers or a text; None: not measured.
        shown: a number as text.
        better: whether a higher (1) or a lower (-1) number is better; 0: neither.
        shown_deviation: a deviation as text; None: as a number.
    """

    title: str
    of: Callable[[RunResults, Beside], Any]
    shown: Callable[[float], str]
    better: int = 0
    shown_deviation: Callable[[float], str] | None = None

    def values(self, runs: Sequence[RunResults], beside: Sequence[Beside]) -> list[Any]:
        """Of each run; None where it was not measured."""
        found = [self.of(run, each) for run, each in zip(runs, beside, strict=True)]
        return [None if isinstance(value, float) and math.isnan(value) else value for value in found]

    def cell(self, values: Sequence[Any]) -> str:
        """Mean and sample standard deviation of the runs' values, or the text that they have in common."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return NOTHING
        if isinstance(known[0], str):
            return " / ".join(dict.fromkeys(known))
        if isinstance(known[0], tuple):
            return " → ".join(self._spread(each) for each in zip(*known, strict=True))
        return self._spread(known)

    def _spread(self, values: Sequence[float]) -> str:
        mean = self.shown(fmean(values))
        if len(values) < 2:
            return mean
        # What was counted alike in all seeds has no deviation worth a word.
        if max(values) == min(values):
            return mean
        return f"{mean} ± {(self.shown_deviation or self.shown)(stdev(values))}"


# ------------------------------------------------------------------------------------------------- numbers as text


def points(fraction: float) -> str:
    return percent(fraction, 2)


def count(number: float) -> str:
    return f"{round(number):,}"


def millions(number: float) -> str:
    """A number of parameters: 85.8M, 92.2k."""
    for unit, each in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= each:
            return f"{number / each:.{1 if number >= 10 * each else 2}f}{unit}"
    return count(number)


def operations(number: float) -> str:
    for unit, each in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if number >= each:
            return f"{number / each:.1f} {unit}FLOP"
    return f"{number:.0f} FLOP"


def whole_percent(fraction: float) -> str:
    return f"{100 * fraction:.0f}%"


def times(ratio: float) -> str:
    return f"{ratio:.2f}×"


def two_places(value: float) -> str:
    return f"{value:.2f}"


def leveled(*levels: tuple[float, str]) -> Callable[[float], str]:
    """A number of at most 1 with a word for it: that of the first limit which it is below."""
    return lambda value: f"{next(word for limit, word in levels if value < limit)} ({value:.2f})"


# ------------------------------------------------------------------------------------------------- of a run


def _metric(name: str) -> Callable[[RunResults, Beside], float | None]:
    return lambda run, beside: run.metrics.get(name)


def _first_final(run: RunResults, beside: Beside) -> float | None:
    tasks = finished_tasks(run.accuracy_matrix)
    return run.accuracy_matrix[tasks - 1][0] if tasks else None


def _first_then(run: RunResults, beside: Beside) -> tuple[float, float] | None:
    return (run.accuracy_matrix[0][0], _first_final(run, beside)) if finished_tasks(run.accuracy_matrix) else None


def _intransigence(run: RunResults, beside: Beside) -> float | None:
    return None if beside.reference is None else run.intransigence(beside.reference)


def kept(run: RunResults) -> int:
    """Bytes that are kept from task to task beside what predicts."""
    return sum((run.kept_bytes or {}).values()) + (run.sums_bytes or 0)


def _memory(run: RunResults, beside: Beside) -> int | None:
    """Beside one backbone: what the adapter, sums, a memory or Fisher information take."""
    if run.adapter_bytes is None or run.kept_bytes is None or run.backbone is None:
        return None
    return kept(run) + run.adapter_bytes - run.backbone["saved_bytes"]


def _parameters(run: RunResults, beside: Beside) -> str | None:
    """As the specification's tables have it: of the backbone, and what is trained in a task beside it."""
    if run.backbone is None:
        return None
    own = run.trainable_parameters - run.backbone["trained"]
    return f"{millions(run.backbone['parameters'])} + {millions(own)}"


def _per_task(run: RunResults, beside: Beside) -> float | None:
    tasks = run.finished_tasks
    return (run.train_seconds + (run.query_seconds or 0.0)) / tasks if tasks else None


def _seconds(run: RunResults, beside: Beside) -> float:
    return run.train_seconds + (run.query_seconds or 0.0)


def _relative_time(run: RunResults, beside: Beside) -> float | None:
    other = beside.relative_to
    return None if other is None else _seconds(run, beside) / max(_seconds(other, beside), 1e-9)


def _relative_flops(run: RunResults, beside: Beside) -> float | None:
    other = beside.relative_to
    return None if other is None or not other.flops or run.flops is None else run.flops / other.flops


def _usage(of: Callable[[Any], float]) -> Callable[[RunResults, Beside], float | None]:
    return lambda run, beside: None if run.prompt_usage is None else of(run.prompt_usage)


#: By the name that a suite gives a column.
MEASURES = {
    "average-accuracy": Measure("Final average accuracy (%)", _metric("average_accuracy"), points, 1),
    "overall-accuracy": Measure("Accuracy over all images (%)", _metric("overall_accuracy"), points, 1),
    "incremental-accuracy": Measure(
        "Average incremental accuracy (%)", _metric("average_incremental_accuracy"), points, 1
    ),
    "first-task-final": Measure("Task 1 final (%)", _first_final, points, 1),
    "first-task": Measure("Task 1: learnt → final (%)", _first_then, points),
    "forgetting": Measure("Forgetting (%)", _metric("forgetting"), points, -1),
    "backward-transfer": Measure("Backward transfer (%)", _metric("backward_transfer"), points, 1),
    "forward-transfer": Measure("Forward transfer (%)", _metric("forward_transfer"), points, 1),
    "intransigence": Measure("Intransigence (%)", _intransigence, points, -1),
    "task-identification": Measure("Task identification (%)", lambda run, beside: run.task_identification, points, 1),
    "parameters": Measure("Parameters", _parameters, str),
    "trainable-parameters": Measure("Trained a task", lambda run, beside: run.trainable_parameters, millions),
    "adapter-size": Measure("Adapter", lambda run, beside: run.adapter_bytes, size, -1),
    "kept": Measure("Kept to learn on", lambda run, beside: kept(run), size, -1),
    "memory": Measure("Memory", _memory, size, -1),
    "peak-memory": Measure("Peak memory", lambda run, beside: run.peak_memory_bytes, size, -1),
    "training-time": Measure("Training time", _seconds, duration, -1),
    "time-per-task": Measure("Time a task", _per_task, duration, -1),
    "relative-time": Measure("Relative time", _relative_time, times, -1),
    "flops": Measure("Operations", lambda run, beside: run.flops, operations, -1),
    "relative-flops": Measure("FLOPs", _relative_flops, whole_percent, -1),
    "category": Measure("Category", lambda run, beside: beside.category, str),
    "selection-diversity": Measure(
        "Selection diversity",
        _usage(selection_diversity),
        leveled((0.5, "low"), (0.75, "medium"), (math.inf, "high")),
        shown_deviation=two_places,
    ),
    "prompt-usage": Measure(
        "Prompt usage",
        _usage(usage_density),
        leveled((0.2, "sparse"), (0.4, "moderate"), (0.7, "balanced"), (math.inf, "dense")),
        shown_deviation=two_places,
    ),
}
#: Measures that need the operations counted.
COUNTING = ("flops", "relative-flops")
