"""`--unknown`: images of classes that an adapter has never seen, and how well scores tell them from the others."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image
from torch import nn
from torch.utils.data import DataLoader

from ..disk import local_path
from ..reliability.scores import ImageScorer, scores_of, separation
from ..scenarios import ContinualCollator
from ..scenarios.columns import find_image_column, read_labels
from ..text import counted, percent
from ..trainer.bad_images import BadImageError, ImageReader
from ..trainer.examples import TaskExamples
from .adapters import SavedAdapter
from .bars import batch_bar
from .errors import CommandError, explained, some
from .folders import image_files, kind_of, visible_files
from .learnt_images import LearntImages
from .sections import DatasetSettings
from .sources import load_splits
from .tasks import names_of_classes


#: Endings of files that a data set is read from, in place of the images of a folder one by one.
DATA_FILES = (".parquet", ".arrow", ".csv", ".json", ".jsonl", ".tar", ".zip")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--unknown",
        metavar="DATASET",
        help="images of classes never seen: a data set, of which learnt classes are left out, or a folder of images; "
        "prints how well scores tell them from the images measured on (AUROC, false positive rate)",
    )


@dataclass(frozen=True)
class UnknownImages:
    """Images of classes that an adapter has not learnt.

    Attributes:
        dataset: What the user called the data set, or the folder.
        split: The split that they are of; `None`: a folder's images.
        examples: The data, the images of classes learnt left out.
        column: Column of the images.
        left_out: How many images of classes learnt there were.
    """

    dataset: str
    split: str | None
    examples: Dataset
    column: str
    left_out: int


def load_unknown(
    name: str, adapter: SavedAdapter, settings: DatasetSettings, examples: Dataset, task: str | None = None
) -> UnknownImages:
    """Load what `--unknown` names.

    Args:
        name: A data set or a folder of images.
        adapter: The adapter, whose classes are left out.
        settings: Of the data set that is measured on; if it is the same one, its other classes are meant.
        examples: The images of that data set.
        task: What the classes bear the name of, as `names_of_classes` has it.

    Raises:
        CommandError: There is no such data, it cannot be read, or all of its images are of classes learnt.
    """
    folder = local_path(name)
    if name == settings.path:
        split = settings.test_split
    elif folder.is_dir() and (files := _bare_images(folder)):
        split, examples = None, Dataset.from_dict({"image": [str(folder / file) for file in files]})
        examples = examples.cast_column("image", Image())
    else:
        own = DatasetSettings(name, label_column=settings.label_column)
        splits = load_splits(own)
        # Any split will do: the adapter has seen none of its images.
        split = settings.test_split if settings.test_split in splits else list(splits)[-1]
        examples = splits[split]
    with explained(f"The images of --unknown {name!r} cannot be used"):
        column = find_image_column(examples, examples, settings.image_column if name == settings.path else None)
        if split is None:
            names = np.array([Path(file).parent.name for file in files])
        elif settings.label_column in examples.column_names:
            labels = read_labels(examples, examples, settings.label_column)
            names = np.array(labels.names)[labels.test]
        else:
            names = np.full(len(examples), "")  # nothing says what they show: the user does
    learnt = names_of_classes(adapter, names.tolist(), task)
    kept = np.flatnonzero([each not in adapter.config.classes for each in learnt])
    if not len(kept):
        raise CommandError(
            f"--unknown is {name!r}, but all of its images are of classes that the adapter has learnt "
            f"({some(sorted(set(learnt)))}). Give images of other classes."
        )
    return UnknownImages(name, split, examples.select(kept), column, len(examples) - len(kept))


def _bare_images(folder: Path) -> list[str]:
    """The images of a folder that holds nothing else to be read as data."""
    kinds = {kind_of(name) for _, files in visible_files(folder) for name in files}
    return [] if kinds & set(DATA_FILES) else image_files(folder)


def measure_unknown(model: nn.Module, known: LearntImages, unknown: UnknownImages, batch_size: int) -> dict[str, Any]:
    """Score both kinds of images by the model, which is told the task of none, and say how far they are apart.

    Returns:
        `dataset`, `split`, `images` (of unknown classes), `left_out` (of learnt ones), `scores` (name -> `auroc` and
        `false_positive_rate_at_95`) and `missing` (name of a score -> why the adapter has none).

    Raises:
        CommandError: An image cannot be read, or a score is not a number.
    """
    transform = known.collator.transform
    images = TaskExamples(
        [unknown.examples],
        {},
        reader=ImageReader(unknown.column, transform.to_rgb, "Mend the file or remove it from the data."),
        names=[(None, unknown.split or "unknown")],
    )
    collator = ContinualCollator(transform, [], unknown.column, unlabelled=True)
    with explained("The images of --unknown cannot be scored"):
        scorer = ImageScorer(model)
    scored = []
    try:
        for examples, collate in ((known.images, known.collator), (images, collator)):
            batches = DataLoader(examples, batch_size, collate_fn=collate)
            scored.append(scores_of(scorer, batch_bar(batches, "scores")))
    except BadImageError as error:
        raise CommandError(str(error)) from error
    with explained("The scores cannot be compared"):
        scores = separation(*scored)
    return {
        "dataset": unknown.dataset,
        "split": unknown.split,
        "images": len(unknown.examples),
        "left_out": unknown.left_out,
        "scores": scores,
        "missing": scorer.missing,
    }


def described(found: Mapping[str, Any]) -> list[str]:
    """Lines of text of what `measure_unknown` found: a heading, and a line for each score."""
    split = f", {found['split']}" if found["split"] else ""
    left_out = f" ({counted(found['left_out'], 'image')} of classes learnt left out)" if found["left_out"] else ""
    lines = [f"classes never seen: {counted(found['images'], 'image')} of {found['dataset']}{split}{left_out}"]
    width = max(map(len, [*found["scores"], *found["missing"]]))
    lines += [f"{'score':<{width}}     AUROC  false positives at 95% kept"]
    for name, values in found["scores"].items():
        area, rate = (percent(values[key], 2) for key in ("auroc", "false_positive_rate_at_95"))
        lines += [f"{name:<{width}}  {area:>7}%  {rate:>7}%"]
    return lines + [f"no {name}: {reason}." for name, reason in found["missing"].items()]
