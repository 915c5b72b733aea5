"""What `peft-cl tune` is given: its options, and the settings that it searches, checked before anything is loaded."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hub.terms import METRICS
from ..tuning.space import Dimension
from .errors import CommandError, unknown
from .options import apply_overrides, read_config
from .settings import SECTIONS, make_settings, unknown_section


#: Options -> their default; those that are not given to --resume are as the search was begun with.
DEFAULTS = {
    "trials": 20,
    "tasks": None,
    "holdout": 0.2,
    "holdout_seed": 0,
    "seeds": 1,
    "metric": "average_accuracy",
    "prune": False,
    "sampler_seed": 0,
}
#: First tasks that a trial learns, if the scenario has as many.
TASKS = 3
#: Metrics of which a lower value is a better one.
LOWER_IS_BETTER = ("forgetting", "per_step_forgetting")
#: Metrics of what tasks do to each other.
OF_SEVERAL_TASKS = (*LOWER_IS_BETTER, "backward_transfer", "forward_transfer")
#: What says what is judged, and on what: the same for all trials.
FIXED = ("dataset", "scenario", "earlier_test", "continue_from", "output_dir", "training.seed")
#: Combinations with other settings that a value is tried in before it is taken for refused.
COMBINATIONS = 20
#: Settings of the training that a trial has in the place of the configuration's: it is measured, and not kept.
OF_A_TRIAL = {"pictures": False, "push_to_hub": False, "hub_token": None, "disable_tqdm": True}


@dataclass(frozen=True)
class Options:
    """The options of the command, checked; `tasks` is None where it follows from the scenario."""

    trials: int
    tasks: int | None
    holdout: float
    holdout_seed: int
    seeds: int
    metric: str
    prune: bool
    sampler_seed: int
    jobs: int

    def __post_init__(self) -> None:
        for name in ("trials", "tasks", "seeds", "jobs", "holdout_seed", "sampler_seed"):
            value, least = getattr(self, name), 0 if name.endswith("_seed") else 1
            if value is not None and value < least:
                raise CommandError(
                    f"--{name.replace('_', '-')} is {value}, but must be a whole number of at least {least}. Give one "
                    f"such as {least + 2}."
                )
        if not 0 < self.holdout < 1:
            raise CommandError(
                f"--holdout is {self.holdout:g}, but must be a share between 0 and 1. Give one such as 0.2."
            )
        if self.metric not in METRICS:
            raise unknown("metric", self.metric, METRICS)

    def kept(self) -> dict[str, Any]:
        """Those that a search keeps."""
        return {name: getattr(self, name) for name in DEFAULTS}


def search_file(path: str, config: Mapping[str, Any]) -> Any:
    """The section `search` from a file of its own, in which it may stand under that name or by itself."""
    if "search" in config and Path(path).is_file() and config["search"] != _section(path):
        raise CommandError(f"The configuration has a section search, and --search is {path!r} too. Take one out.")
    return _section(path)


def _section(path: str) -> Any:
    found = read_config(path)
    return found["search"] if set(found) == {"search"} else found


def check_names(space: Sequence[Dimension], config: Mapping[str, Any]) -> None:
    """Refuse settings that there are none of, and those that say what is judged."""
    if config.get("continue_from") is not None:
        raise CommandError(
            "continue_from is given, but trials begin with a new adapter. Take it out, and search before the adapter "
            "is trained."
        )
    for each in space:
        section = each.name.split(".")[0]
        if section not in SECTIONS:
            raise unknown_section(section)
        if each.name in FIXED or section in FIXED:
            remedy = "Give --seeds for several." if each.name == "training.seed" else "Set it in its own section."
            raise CommandError(
                f"search has {each.name}, but what is judged, and on what, is the same for all trials. {remedy}"
            )


def check_edges(config: dict[str, Any], space: Sequence[Dimension]) -> list[dict[str, Any]]:
    """Refuse a value at the end of a range, or of a list, that no combination with the others goes with.

    Returns:
        Configurations of combinations that do, at least one.
    """
    found = []
    for each in space:
        for value in each.edges():
            reasons = []
            for others in combinations(space):
                changed = with_settings(config, {**others, each.name: value})
                try:
                    make_settings(deepcopy(changed))
                except CommandError as error:
                    reasons.append(str(error))
                else:
                    found.append(changed)
                    break
            else:
                raise CommandError(
                    f"search.{each.name} tries {json.dumps(value)}, which is refused: {reasons[0]} Take it out, or "
                    "correct it."
                )
    return found


def combinations(space: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
    """Values of the settings to try another one with: the configuration's own, the first, the last, and some drawn."""
    yield {}
    yield {each.name: each.edges()[0] for each in space}
    yield {each.name: each.edges()[-1] for each in space}
    generator = random.Random(0)
    for _ in range(COMBINATIONS):
        yield {each.name: generator.choice(each.edges()) for each in space}


def resolved(arguments: argparse.Namespace, kept: Mapping[str, Any]) -> Options:
    """The options: as given, or else as the search was begun with, or else the defaults."""
    values = {}
    for name, default in DEFAULTS.items():
        given = getattr(arguments, name)
        values[name] = kept.get(name, default) if given is None else given
    return Options(**values, jobs=arguments.jobs)


def with_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with other values of settings, by their dotted names.

    Example:
        >>> with_settings({"strategy": "ewc"}, {"strategy.ewc.strength": 10})
        {'strategy': {'ewc': {'strength': 10}}}
    """
    changed = deepcopy(dict(config))
    for section, name in (("model", "name"), ("strategy", None)):  # a text stands for a mapping
        value = changed.get(section)
        if isinstance(value, str) and any(each.startswith(f"{section}.") for each in settings):
            changed[section] = {value: None} if name is None else {name: value}
    apply_overrides(changed, list(settings.items()), SECTIONS)
    return changed


def of_a_trial(config: Mapping[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Return the configuration of a run of a trial, with a seed and a folder of its own."""
    own = {f"training.{name}": value for name, value in OF_A_TRIAL.items()}
    return with_settings(config, {"output_dir": str(folder), "training.seed": seed, **own})
