"""Metrics of the user's own: tried before anything is trained, and measured beside the accuracies."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from transformers import EvalPrediction
from transformers.utils import logging

from ..metrics.own import means_over_tasks, own_value
from ..scenarios import Scenario
from ..text import brief, plain
from ..tuners.base.config import PromptPoolConfig


logger = logging.get_logger(__name__)
Values = dict[str, float | list]
#: In messages.
EXAMPLE = (
    "Give a function of transformers.EvalPrediction that returns numbers or lists of numbers by name, such as "
    "lambda prediction: {'error': float((prediction.predictions.argmax(-1) != prediction.label_ids).mean())}"
)
#: What else stands in a log under the same prefix.
TAKEN = (
    "loss",
    "accuracy",
    "average_accuracy",
    "epoch",
    "task",
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "jit_compilation_time",
    "model_preparation_time",
)
#: Images of each class in a trial.
FAKE = 2


@dataclass
class Metric:
    """One function, and what the trial has found of it.

    Attributes:
        function: of `EvalPrediction`.
        key: what stands before its names, or names its one value; empty: nothing.
        is_list: name -> whether the value is a list; None before the first call.
    """

    function: Callable[[EvalPrediction], Any]
    key: str = ""
    is_list: dict[str, bool] | None = None

    def __call__(self, scores: np.ndarray, labels: np.ndarray) -> Values:
        """What it gives, by name.

        Raises:
            ValueError: it gives something else than numbers and lists by name, or other names than before.
        """
        # Of its own: it may change them.
        found = self.function(EvalPrediction(predictions=scores.copy(), label_ids=labels.copy()))
        if not isinstance(found, Mapping):
            if not self.key:
                raise ValueError(f"it gives {brief(found)}, but must give values by name.")
            found = {"": found}
        if not found or not all(isinstance(name, str) and (name or self.key) for name in found):
            raise ValueError(f"it gives {brief(dict(found))}, but must give values by name.")
        parts = {
            "_".join(filter(None, (self.key, name.removeprefix("eval_")))): value for name, value in found.items()
        }
        values = {name: _value(name, value) for name, value in parts.items()}
        is_list = {name: isinstance(value, list) for name, value in values.items()}
        if self.is_list is None:
            self.is_list = is_list
        if is_list != self.is_list:
            raise ValueError(
                f"it gives {_kinds(is_list)}, but gave {_kinds(self.is_list)} before: names must be the same for each "
                "task. A list may hold one value for each class."
            )
        return values

    def __str__(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"compute_metrics[{self.key!r}]" if self.key else f"compute_metrics ({plain(name)})"


class OwnMetrics:
    """The functions that a trainer got as `compute_metrics`; false without any.

    Args:
        functions: a function, a list of them, a dict of them by what stands before their names, or None.

    Raises:
        ValueError: something else.
    """

    def __init__(self, functions: Any):
        if functions is None:
            functions = []
        elif isinstance(functions, Mapping):
            functions = [Metric(function, key) for key, function in functions.items()]
        else:
            functions = [Metric(each) for each in (functions if isinstance(functions, (list, tuple)) else [functions])]
        for each in functions:
            if not callable(each.function) or not isinstance(each.key, str):
                raise ValueError(f"compute_metrics has {brief(each.function)}, but must have functions. {EXAMPLE}.")
        self.functions: list[Metric] = functions

    def __bool__(self) -> bool:
        return bool(self.functions)

    @property
    def numbers(self) -> list[str]:
        """Names of the values that are numbers."""
        return [name for each in self.functions for name, is_list in (each.is_list or {}).items() if not is_list]

    def check(self, scenario: Scenario, config: PromptPoolConfig) -> None:
        """Try all functions on fake scores of each task, as it will be measured when it was learnt.

        Raises:
            ValueError: one fails or gives no values by name, or two names are one.
        """
        for task, (scores, labels) in zip(scenario, _fakes(scenario, config), strict=True):
            for each in self.functions:
                try:
                    with warnings.catch_warnings():  # which say nothing, of fake scores
                        warnings.simplefilter("ignore")
                        each(scores, labels)
                except Exception as error:  # whatever it may be, it would come again
                    raise ValueError(
                        f"{each} fails on fake logits of the classes of task {task.name!r}: {_said(error)} Correct "
                        f"it: it is called with predictions {scores.shape} and label_ids {labels.shape}. {EXAMPLE}."
                    ) from error
        tasks = [task.name for task in scenario]
        taken = {*TAKEN, *(f"accuracy_{task}" for task in tasks)}
        for name in chain.from_iterable(each.is_list or () for each in self.functions):
            for entry in (name, *(f"{name}_{task}" for task in tasks)):
                if entry in taken:
                    raise ValueError(
                        f"compute_metrics gives {name!r}, but {entry!r} is measured under that name already. Give it "
                        "another, or put a word before it by a dict of functions: {'my': function} gives "
                        f"'my_{name}'."
                    )
                taken.add(entry)

    def measure(self, scores: np.ndarray, labels: np.ndarray, what: str) -> Values:
        """All values of some examples; NaN, with a warning, where a function fails: accuracies are measured all the
        same.

        Args:
            scores: (N, classes), float32.
            labels: (N,).
            what: the examples, in a warning.
        """
        found: Values = {}
        for each in self.functions:
            try:
                found |= each(scores, labels)
            except Exception as error:
                found |= dict.fromkeys(each.is_list or (), math.nan)
                logger.warning("%s fails on %s and is NaN there: %s", each, plain(what), _said(error))
        return found


def by_task(values: Sequence[Values], places: Sequence[int], tasks: int) -> dict[str, list]:
    """The field `own_metrics` of a record: by name a value for each of `tasks`, NaN for those not measured.

    Args:
        values: of the tasks measured.
        places: numbers of these tasks.
    """
    found = {name: [math.nan] * tasks for name in values[0]}
    for place, each in zip(places, values, strict=True):
        for name, value in each.items():
            found[name][place] = value
    return found


def entries(values: Sequence[Values], tasks: Sequence[str], seen: int) -> Values:
    """What is logged: the mean of each number over the first `seen` tasks, and all values of each task."""
    if not values:
        return {}
    means = means_over_tasks({name: [each[name] for each in values[:seen]] for name in values[0]})
    each_task = (
        (f"{name}_{task}", value) for task, found in zip(tasks, values, strict=True) for name, value in found.items()
    )
    return {**means, **dict(each_task)}


def _fakes(scenario: Scenario, config: PromptPoolConfig) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each task scores (N, classes seen) and labels (N,), as measuring it after its training gives them."""
    generator = np.random.default_rng(0)
    known = list(config.classes) if config.tasks else []
    for task in scenario:
        known = list(dict.fromkeys([*known, *(task.classes if scenario.boundaries else scenario.classes)]))
        row = {name: place for place, name in enumerate(known)}
        own = [row[name] for name in task.classes]
        labels = np.repeat(own, FAKE)
        scores = generator.normal(size=(len(labels), len(known))).astype(np.float32)
        if scenario.task_known:
            scores[:, np.setdiff1d(np.arange(len(known)), own)] = -np.inf
        yield scores, labels


def _value(name: str, value: Any) -> float | list:
    try:
        return own_value(value)
    except ValueError as error:
        raise ValueError(f"it gives {plain(name)}, but {error}") from error


def _kinds(is_list: Mapping[str, bool]) -> str:
    return ", ".join(f"{plain(name)} ({'list' if each else 'number'})" for name, each in is_list.items())


def _said(error: Exception) -> str:
    """An error in a sentence; those of checks here are such."""
    text = str(error)
    return plain(text if text.startswith("it gives") else f"{type(error).__name__}: {text}".rstrip(". ") + ".", 500)
