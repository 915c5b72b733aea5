"""Whether a split is one that an adapter has learnt or was tested on, as far as the record of its run tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from ..disk import local_path
from ..metrics import RunResults
from .sections import DatasetSettings


TEST, TRAINING = "test", "training"
DEFAULTS = {
    name: field.default for name, field in DatasetSettings.__dataclass_fields__.items() if field.default is not MISSING
}


def own_split(record: RunResults | None, settings: DatasetSettings, images: int) -> str | None:
    """`TEST` or `TRAINING`, where the test split of `settings` is that of the run's; `None` where it is neither.

    Args:
        record: The record of the run.
        settings: The data.
        images: How many images the split has of classes that the adapter has learnt.
    """
    if record is None:
        return None
    recorded = record.hyperparameters.get("data") or {}
    # One data set, or several by name.
    of_run = [each for each in (recorded, *recorded.values()) if isinstance(each, dict) and "path" in each]
    given = vars(settings)
    for own in ({**DEFAULTS, **each} for each in of_run):
        if _place(own) == _place(given):
            if _division(own) == _division(given):
                return TEST
            if own["train_split"] == settings.test_split and settings.test_fraction is None:
                return TRAINING
    # Of a run in Python there is the name of the data, and how many test images there are.
    named = Path(settings.path).name == Path(record.dataset).name
    tested = sum(record.test_sizes[: record.finished_tasks])
    return TEST if not of_run and named and images == tested else None


def _place(data: Mapping[str, Any]) -> tuple:
    path = local_path(str(data["path"]))
    place = str(path.resolve()) if path.exists() else data["path"]
    return place, data["name"], data["data_dir"], repr(data["data_files"])


def _division(data: Mapping[str, Any]) -> tuple:
    """What says which of the images the test split has."""
    if data["test_fraction"] is None:
        return (data["test_split"],)
    return data["train_split"], data["test_fraction"], data["split_seed"]
