"""What a record of a run may hold: kinds and ranges of its fields, by name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from ..text import brief


if TYPE_CHECKING:
    from .results import RunResults


#: Letters that a name may have. Longer ones are no names, and drawing them takes minutes.
MOST_LETTERS = 10_000
#: What rounding may add to a fraction of 1.
ROUNDING = 1e-6


def check_record(results: RunResults) -> None:
    """Refuse fields of another kind than they are written in, and numbers that no run measures.

    Raises:
        ValueError: it names the field, its value and the rule.
    """
    for name in ("method", "base_model", "dataset"):
        _check_text(name, getattr(results, name))
    for name in ("peft_type", "command"):
        if getattr(results, name) is not None:
            _check_text(name, getattr(results, name))
    for name in ("scenario", "hyperparameters", "versions", "metrics"):
        _check_names(name, getattr(results, name))
    for name in _list_of("task_names", results.task_names):
        _check_text("task_names", name)
    _check_scenario(results.scenario)
    for name in ("adapter", "data"):
        _check_names(f"hyperparameters.{name}", results.hyperparameters.get(name) or {})
    _check_numbers(results)
    _check_accuracies(results)


def _check_scenario(scenario: dict[str, Any]) -> None:
    """What identifies the sequence, as far as it is on record."""
    for name in ("class_order", "task_names"):
        for each in _list_of(f"scenario.{name}", scenario.get(name) or []):
            _check_text(f"scenario.{name}", each)
    for name in ("classes_per_task", "train_sizes", "test_sizes"):
        for each in _list_of(f"scenario.{name}", scenario.get(name) or []):
            _check_count(f"scenario.{name}", each)
    _check_text("scenario.name", scenario.get("name") or "")
    _check_names("scenario.settings", scenario.get("settings") or {})
    _check_count("scenario.num_tasks", scenario.get("num_tasks") or 0)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(_wrong(name, value, "a whole number from 0"))


def _check_numbers(results: RunResults) -> None:
    """Counts, sizes, seconds."""
    counts = {name: getattr(results, name) for name in ("trainable_parameters", "total_parameters", "finished_tasks")}
    optional = ("adapter_bytes", "sums_bytes", "peak_memory_bytes", "flops")
    counts |= {name: getattr(results, name) or 0 for name in optional}
    for field in ("kept_bytes", "backbone"):
        _check_names(field, getattr(results, field) or {})
        counts |= {f"{field}[{brief(name)}]": value for name, value in (getattr(results, field) or {}).items()}
    if results.backbone is not None and not set(results.backbone) >= {"parameters", "trained", "saved_bytes"}:
        raise ValueError(_wrong("backbone", results.backbone, "parameters, trained and saved_bytes by name"))
    sizes = [("test_sizes", size) for size in _list_of("test_sizes", results.test_sizes)]
    for name, value in [*counts.items(), *sizes]:
        _check_count(name, value)
    if not isinstance(results.seed, Integral) or isinstance(results.seed, bool):
        raise ValueError(_wrong("seed", results.seed, "a whole number"))
    _check_number("train_seconds", results.train_seconds, 0, math.inf, or_none=False)


def _check_accuracies(results: RunResults) -> None:
    _check_table("accuracy_matrix", results.accuracy_matrix)
    _check_fractions("task_identification", [results.task_identification])
    _check_fractions("baseline", _list_of("baseline", results.baseline or []))
    _check_names("per_class_accuracy", results.per_class_accuracy or {})
    _check_fractions("per_class_accuracy", (results.per_class_accuracy or {}).values())
    _check_names("own_metrics", results.own_metrics or {})  # the values are checked where they are taken
    _check_names("without_prompts", results.without_prompts or {})
    if results.without_prompts is not None:
        _check_text("without_prompts.head", results.without_prompts.get("head"))
        accuracies = _list_of("without_prompts.accuracies", results.without_prompts.get("accuracies"))
        _check_fractions("without_prompts.accuracies", accuracies)
    for name, value in results.metrics.items():  # differences of accuracies among them
        _check_number(f"metrics[{brief(name)}]", value, -1, 1)


def check_calibrations(values: Any, tasks: int) -> None:
    """Refuse what is no field `calibration` of a record with so many finished tasks."""
    _check_list("calibration", values)
    if len(values) != tasks:
        raise ValueError(
            f"calibration has {len(values)} entries, but finished_tasks is {tasks}; give one for each finished task, "
            "None where no temperature was fitted, or None in the place of all."
        )
    for task, value in enumerate(values):
        if value is not None:
            check_calibration(f"calibration[{task}]", value)


def check_calibration(name: str, value: Any) -> None:
    """Refuse what is no `peft_cl.reliability.Calibration` in types that JSON knows."""
    _check_fields(name, value, ("temperature", "before", "after", "images"))
    _check_number(f"{name}.temperature", value["temperature"], 0, math.inf, or_none=False)
    _check_count(f"{name}.images", value["images"])
    for part in ("before", "after"):
        place, measures = f"{name}.{part}", value[part]
        _check_fields(place, measures, ("nll", "ece", "accuracy", "bins"))
        _check_number(f"{place}.nll", measures["nll"], 0, math.inf, or_none=False)
        for fraction in ("ece", "accuracy"):
            _check_number(f"{place}.{fraction}", measures[fraction], 0, 1, or_none=False)
        _check_fields(f"{place}.bins", measures["bins"], ("confidence", "accuracy", "count"))
        columns = {column: _list_of(f"{place}.bins.{column}", each) for column, each in measures["bins"].items()}
        for count in columns["count"]:
            _check_count(f"{place}.bins.count", count)
        for column in ("confidence", "accuracy"):
            _check_fractions(f"{place}.bins.{column}", columns[column])
        empty = [[each is None for each in columns[column]] for column in ("confidence", "accuracy")]
        if any(each != [not count for count in columns["count"]] for each in empty) or not sum(columns["count"]):
            raise ValueError(_wrong(f"{place}.bins", measures["bins"], "a number for each bin that has images"))


def _check_fields(name: str, value: Any, fields: Iterable[str]) -> None:
    _check_names(name, value)
    if set(value) != set(fields):
        raise ValueError(_wrong(name, value, f"{', '.join(fields)} by name"))


def _check_table(name: str, table: Any) -> None:
    for row in _list_of(name, table):
        numbers = np.array(_list_of(name, row), dtype=float)  # None becomes NaN
        outside = numbers[(numbers < -ROUNDING) | (numbers > 1 + ROUNDING)]
        _check_fractions(name, outside.tolist())


def _check_fractions(name: str, values: Iterable[Any]) -> None:
    for value in values:
        _check_number(name, value, 0, 1)


def _check_number(name: str, value: Any, least: float, most: float, *, or_none: bool = True) -> None:
    """None and NaN stand for what was not measured."""
    if or_none and (value is None or (isinstance(value, Real) and math.isnan(value))):
        return
    inside = isinstance(value, Real) and not isinstance(value, bool) and least - ROUNDING <= value <= most + ROUNDING
    if not inside or math.isinf(value):
        bounds = f"from {least}" if math.isinf(most) else f"from {least} to {most}"
        percent = "; divide percentages by 100" if most == 1 else ""
        raise ValueError(_wrong(name, value, f"a number {bounds}{percent}"))


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(_wrong(name, value, "a text"))
    if len(value) > MOST_LETTERS:
        raise ValueError(f"{name} has a name of {len(value):,} letters, but names have at most {MOST_LETTERS:,}.")


def _check_list(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)):
        raise ValueError(_wrong(name, value, "a list"))


def _check_names(name: str, value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(_wrong(name, value, "values by name"))
    for key in value:
        _check_text(name, key)


def _list_of(name: str, value: Any) -> list:
    value = value.tolist() if hasattr(value, "tolist") else value
    _check_list(name, value)
    return value


def _wrong(name: str, value: Any, rule: str) -> str:
    return f"{name} is {brief(value)}, but must be {rule}."
