"""The section `earlier_test`: test images of the tasks that an adapter had learnt before it learns on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from ..scenarios import Scenario
from ..scenarios.columns import read_labels
from .adapters import SavedAdapter
from .errors import CommandError, explained
from .options import fill
from .sections import ONLY, DatasetSettings
from .sources import load_data


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
    images, rows = found[ONLY], [row for task in adapter.config.tasks or () for row in task]
    if len(set(rows)) == len(rows):
        return images
    if domains not in images.column_names:
        raise CommandError(
            f"earlier_test is one data set, but the adapter's tasks share classes, and it has no column {domains!r} "
            f"that says the task; its columns are {images.column_names}. Set scenario.domain_column, or give "
            "earlier_test a data set for each task: {name of the task: path}."
        )
    with explained(f"The column {domains!r} of earlier_test cannot be used"):
        tasks = read_labels(images, images, domains)
    names = {name: number for number, name in enumerate(tasks.names)}
    known = [name for name in (adapter.results.task_names if adapter.results else ()) if name in names]
    return {name: images.select(np.flatnonzero(tasks.test == names[name])) for name in known}


def _load(settings: DatasetSettings, scenario: Scenario) -> Dataset:
    splits = load_data(settings)
    if settings.test_split not in splits:
        raise CommandError(
            f"The data set {settings.path!r} of earlier_test has no split {settings.test_split!r}; it has "
            f"{list(splits)}. Set earlier_test.test_split."
        )
    images = splits[settings.test_split]
    if settings.label_column not in images.column_names:
        raise CommandError(
            f"The data set {settings.path!r} of earlier_test has no column {settings.label_column!r}; its columns are "
            f"{images.column_names}. Set earlier_test.label_column."
        )
    if settings.image_column:
        images = images.select_columns([settings.image_column, settings.label_column])
    if settings.label_column == scenario.label_column:
        return images
    return images.rename_column(settings.label_column, scenario.label_column)
