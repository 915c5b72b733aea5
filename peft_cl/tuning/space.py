"""What a search tries: settings by their dotted names, each with a range or a list of values."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..scenarios.columns import is_number
from ..text import brief, counted


if TYPE_CHECKING:  # optuna is optional
    from optuna.distributions import BaseDistribution


EXAMPLE = "training.learning_rate: {low: 1.0e-4, high: 1.0e-1, log: true}"
RANGE = ("low", "high", "log", "step")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included: whole ones where `low`, `high` and `step` are whole.

    Attributes:
        name: Dotted name of the setting.
        low, high: The ends.
        log: Whether the logarithm is drawn evenly, as for learning rates.
        step: Distance of the numbers tried, counted from `low`; `None`: 1 of whole numbers, any of others.
    """

    name: str
    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __str__(self) -> str:
        whole = "whole numbers from " if self._is_whole else ""
        scale = ", on a logarithmic scale" if self.log else ""
        return f"{whole}{self.low:g} to {self.high:g}{scale}" + (f" in steps of {self.step:g}" if self.step else "")

    @property
    def _is_whole(self) -> bool:
        return all(isinstance(each, int) for each in (self.low, self.high, self.step or 0))

    def edges(self) -> list[Any]:
        """Values that stand for all: what is refused for them is told before the search."""
        return [self.low, self.high]

    def distribution(self) -> BaseDistribution:
        """What optuna draws from."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self._is_whole:
            return IntDistribution(self.low, self.high, log=self.log, step=self.step or 1)
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def value(self, drawn: Any) -> Any:
        """The setting's value for what optuna drew."""
        return drawn

    def facts(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "name"}


@dataclass(frozen=True)
class Choice:
    """One of several values: numbers, text, true or false, null, lists or mappings.

    Attributes:
        name: Dotted name of the setting.
        values: The values, at least two, none twice.
    """

    name: str
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(map(_label, self.values))}"

    def edges(self) -> list[Any]:
        return list(self.values)

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        # optuna keeps numbers and text alone, and takes true for 1: each value has a text of its own.
        return CategoricalDistribution([_label(value) for value in self.values])

    def value(self, drawn: Any) -> Any:
        return next(value for value in self.values if _label(value) == drawn)

    def facts(self) -> list[Any]:
        return list(self.values)


Dimension = Range | Choice


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def parse_space(section: Any) -> list[Dimension]:
    """Turn the section `search` into what is tried of each setting.

    Args:
        section: Mapping from dotted names of settings to a list of values, or to a range: `low` and `high`, `log`
            (default: false) and `step` (default: none).

    Raises:
        ValueError: It is no such mapping, or what is tried of a setting is no range and no list of two values.

    Example:
        >>> [str(each) for each in parse_space({"adapter.pool_size": {"low": 5, "high": 20, "step": 5}})]
        ['whole numbers from 5 to 20 in steps of 5']
    """
    if not isinstance(section, Mapping) or not section:
        what = "missing" if section is None else brief(section)
        raise ValueError(
            f"search is {what}, but must be a mapping of at least one setting to what is tried of it. Give one such "
            f"as `search: {{{EXAMPLE}}}`."
        )
    return [_dimension(name, tried) for name, tried in section.items()]


def _dimension(name: Any, tried: Any) -> Dimension:
    if not isinstance(name, str):
        raise ValueError(f"search has {brief(name)}, but settings have names. Give one such as `{EXAMPLE}`.")
    if isinstance(tried, Mapping):
        return _range(name, tried)
    if not isinstance(tried, list):
        raise ValueError(
            f"search.{name} is {brief(tried)}, but must be a range or a list of values. Give one such as "
            f"`{name}: {{low: 0.1, high: 0.5}}`; a fixed value belongs into the section {name.split('.')[0]}."
        )
    labels = [_label(value) for value in tried]
    if len(labels) < 2:
        raise ValueError(
            f"search.{name} has {counted(len(labels), 'value')}, so there is nothing to choose. Give at least two, or "
            f"take it out{' and set it in its own section' if labels else ''}."
        )
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"search.{name} has {twice} more than once. Take one out.")
    return Choice(name, tuple(tried))


def _range(name: str, tried: Mapping[str, Any]) -> Range:
    _check_keys(name, tried)
    low, high, step, log = tried["low"], tried["high"], tried.get("step"), tried.get("log", False)
    for key, value in (("low", low), ("high", high), ("step", 1 if step is None else step)):
        if not (is_number(value) and math.isfinite(value)):
            raise ValueError(
                f"search.{name}.{key} is {brief(value)}, but must be a finite number. Give one such as 1."
            )
    if not isinstance(log, bool):
        raise ValueError(f"search.{name}.log is {brief(log)}, but must be true or false. Give one of them.")
    if not low < high:
        same = " A single value belongs into its own section." if low == high else " Exchange them."
        raise ValueError(f"search.{name} has low {low:g} and high {high:g}, but low must be below high.{same}")
    if log and low <= 0:
        raise ValueError(
            f"search.{name} has log and low {low:g}, but a logarithm needs numbers above 0. Give a low above "
            "0, such as 1.0e-5, or take log out."
        )
    if step is not None:
        _check_step(name, low, high, step, log)
    if not all(isinstance(each, int) for each in (low, high, step or 0)):
        low, high, step = float(low), float(high), None if step is None else float(step)
    return Range(name, low, high, log, step)


def _check_keys(name: str, tried: Mapping[str, Any]) -> None:
    for key in tried:
        if key not in RANGE:
            near = difflib.get_close_matches(str(key), RANGE, n=1)
            raise ValueError(
                f"search.{name} has {brief(key)}, but a range has {', '.join(RANGE)}."
                + (f" Did you mean {near[0]}?" if near else f" Settings have dotted names, such as {name}.{key}.")
            )
    for key in ("low", "high"):
        if key not in tried:
            raise ValueError(f"search.{name} has no {key}. Give low and high, such as {{low: 0.1, high: 0.5}}.")


def _check_step(name: str, low: float, high: float, step: float, log: bool) -> None:
    if log:
        raise ValueError(f"search.{name} has both log and step {step:g}. Take one of them out.")
    if not 0 < step <= high - low:
        raise ValueError(
            f"search.{name}.step is {step:g}, but must be above 0 and at most high - low, {high - low:g}. Give one "
            f"such as {(high - low) / 4:g}."
        )
    steps = (high - low) / step
    if abs(steps - round(steps)) > 1e-6:
        raise ValueError(
            f"search.{name} has low {low:g}, high {high:g} and step {step:g}, but high must be low and a whole number "
            f"of steps. Give a high such as {low + step * math.floor(steps):g}."
        )
