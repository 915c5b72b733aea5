"""Images beside those that are learnt: of tasks learnt before (`earlier_test`), and to choose by
(`validation_split`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from ..scenarios import Scenario
from ..scenarios.columns import read_labels
from .adapters import SavedAdapter
from .errors import CommandError, explained
from .options import fill
from .sections import ONLY, DatasetSettings
from .sources import load_data, split_of


def make_earlier_test(values: Any, earlier: SavedAdapter | None) -> dict[str, DatasetSettings] | None:
    """Turn the section into settings: one data set, or several by the name of their task.

    Raises:
        CommandError: There is no adapter to continue from, or the section is none of these.
    """
    if values is None:
        return None
    if earlier is None:
        raise CommandError(
            "earlier_test is given, but continue_from is not, so there are no earlier tasks to measure. Take "
            "earlier_test out, or name the adapter by --continue-from."
        )
    if isinstance(values, str):
        values = {"path": values}
    if isinstance(values, Mapping) and "path" not in values and values:
        return {
            str(name): fill(f"earlier_test.{name}", DatasetSettings, {"path": each} if isinstance(each, str) else each)
            for name, each in values.items()
        }
    return {ONLY: fill("earlier_test", DatasetSettings, values)}


def load_earlier_test(
    settings: Mapping[str, DatasetSettings] | None, adapter: SavedAdapter | None, scenario: Scenario, domains: str
) -> Dataset | dict[str, Dataset] | None:
    """Load the images as the trainer takes them, their labels in the scenario's column.

    Args:
        settings: What `make_earlier_test` made.
        adapter: The adapter whose tasks they are of.
        scenario: What it is to learn.
        domains: Column that says the task of an image in one data set, where tasks share their classes.
    """
    if settings is None:
        return None
    found = {name: _load(each, scenario) for name, each in settings.items()}
    if ONLY not in found:
        return found
    images, tasks = found[ONLY], adapter.config.tasks or ()
    if _are_apart(tasks):
        return images
    if domains not in images.column_names:
        raise CommandError(
            f"earlier_test is one data set, but the adapter's tasks share classes, and it has no column {domains!r} "
            f"that says the task; its columns are {images.column_names}. Set scenario.domain_column, or give "
            "earlier_test a data set for each task: {name of the task: path}."
        )
    return _by_domain(images, domains, adapter.results.task_names if adapter.results else (), "earlier_test")


def load_validation(
    settings: Mapping[str, DatasetSettings], scenario: Scenario, domains: str
) -> Dataset | dict[str, Dataset] | None:
    """Load the images to choose by, as the trainer takes them; None where no data set names a split of such.

    Args:
        settings: The data sets.
        scenario: What is made of them.
        domains: Column that says the task of an image where tasks share their classes.
    """
    given = [each.validation_split is not None for each in settings.values()]
    if not any(given):
        return None
    if not all(given):
        raise CommandError(
            "dataset.validation_split is given for some of the data sets, but what is chosen by must be there for "
            "all. Give it for each, or training.validation_fraction in its place."
        )
    found = {name: _load(each, scenario, "validation_split") for name, each in settings.items()}
    if ONLY not in found:
        return found
    if _are_apart([task.classes for task in scenario]):
        return found[ONLY]
    return _by_domain(found[ONLY], domains, [task.name for task in scenario], "dataset.validation_split")


def _are_apart(tasks: Sequence[Sequence[Any]]) -> bool:
    """Whether a class says the task."""
    every = [each for task in tasks for each in task]
    return len(set(every)) == len(every)


def _by_domain(images: Dataset, column: str, tasks: Sequence[str], what: str) -> dict[str, Dataset]:
    with explained(f"The column {column!r} of {what} cannot be used"):
        values = read_labels(images, images, column)
    number = {name: value for value, name in enumerate(values.names)}
    return {name: images.select(np.flatnonzero(values.test == number[name])) for name in tasks if name in number}


def _load(settings: DatasetSettings, scenario: Scenario, setting: str = "test_split") -> Dataset:
    """The split that `setting` names, its labels in the scenario's column."""
    section = "earlier_test" if setting == "test_split" else "dataset"
    if setting == "validation_split":  # beside the test split, of which a fraction may be made
        settings = replace(settings, test_fraction=None)
    images = split_of(load_data(settings), settings, setting, section)
    if settings.label_column not in images.column_names:
        raise CommandError(
            f"The data set {settings.path!r} has no column {settings.label_column!r}; its columns are "
            f"{images.column_names}. Set {section}.label_column."
        )
    if settings.image_column:
        images = images.select_columns([settings.image_column, settings.label_column])
    if settings.label_column == scenario.label_column:
        return images
    return images.rename_column(settings.label_column, scenario.label_column)
