"""`peft-cl evaluate`: measure a saved adapter on a data set, overall, by task and by class."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..metrics import RunResults
from ..scenarios import ContinualCollator, ImageTransform
from ..scenarios.columns import find_image_column, read_labels
from ..strategies.fine_tuning import BACKBONE_FOLDER
from ..tuners.base.config import PromptPoolConfig
from .errors import CommandError, explained
from .settings import DatasetSettings
from .sources import adapter_folder, load_backbone, load_config, load_data, load_processor


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = {name: field.metadata["help"] for name, field in DatasetSettings.__dataclass_fields__.items()}
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter, or its name on the Hub")
    parser.add_argument("--dataset", required=True, metavar="D", help=data["path"])
    parser.add_argument("--dataset-name", metavar="NAME", help=data["name"])
    parser.add_argument("--split", default="test", help="split to measure on (default: test)")
    parser.add_argument("--label-column", default="label", metavar="NAME", help=data["label_column"])
    parser.add_argument("--image-column", metavar="NAME", help="column of the images, if there are several")
    parser.add_argument("--test-fraction", type=float, metavar="F", help="measure on the share held back in training")
    parser.add_argument("--split-seed", type=int, default=0, metavar="N", help="seed of that share (default: 0)")
    parser.add_argument("--model", metavar="NAME", help="base model; default: the one that the adapter names")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as in training")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images in a batch (default: 64)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")


@dataclass(frozen=True)
class Evaluation:
    """What was measured; accuracies from 0 to 1, a task's or class's `None` where the data has no image of it."""

    adapter: str
    dataset: str
    split: str
    images: int
    left_out: int  # images of classes that the adapter has not learnt
    accuracy: float
    average_accuracy: float  # mean over the tasks, the figure that runs are compared by
    tasks: dict[str, float | None]
    classes: dict[str, float | None]

    def __str__(self) -> str:
        lines = [
            f"{self.adapter} on {self.dataset}, {self.split}: {self.images:,} images",
            *([f"left out: {self.left_out:,} images of classes that it has not learnt"] if self.left_out else []),
            "",
            f"accuracy          {self.accuracy:8.2%}  (of all images)",
            f"average accuracy  {self.average_accuracy:8.2%}  (mean over the tasks)",
        ]
        for heading, entries in (("task", self.tasks), ("class", self.classes)):
            width = max(map(len, [heading, *entries]))
            lines += ["", f"{heading:<{width}}  accuracy"]
            lines += [f"{name:<{width}}  {'–' if v is None else format(v, '.2%'):>8}" for name, v in entries.items()]
        return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    if arguments.batch_size < 1:
        raise CommandError(f"--batch-size is {arguments.batch_size}, but must be at least 1.")
    folder = adapter_folder(arguments.adapter)
    with explained("The options of the data are wrong"):
        settings = DatasetSettings(
            path=arguments.dataset,
            name=arguments.dataset_name,
            label_column=arguments.label_column,
            image_column=arguments.image_column,
            test_split=arguments.split,
            test_fraction=arguments.test_fraction,
            split_seed=arguments.split_seed,
        )
    config = load_config(folder)
    examples = load_split(settings)
    model = load_adapter(folder, config, arguments.model, arguments.dtype or recorded_dtype(folder))
    evaluation = evaluate(model, folder, examples, settings, arguments.batch_size)
    print(json.dumps(vars(evaluation), indent=2) if arguments.json else evaluation)


def load_split(settings: DatasetSettings) -> Dataset:
    splits = load_data(settings)
    if settings.test_split not in splits:
        raise CommandError(
            f"The data set {settings.path!r} has no split {settings.test_split!r}; it has {list(splits)}. Give one of "
            "them by --split."
        )
    return splits[settings.test_split]


def recorded_dtype(folder: Path) -> str:
    """The number format of the backbone in training; float32 where it is not on record."""
    try:
        return RunResults.load(folder).hyperparameters.get("backbone_dtype", "float32")
    except (OSError, ValueError):
        return "float32"


def load_adapter(folder: Path, config: PromptPoolConfig, model: str | None, dtype: str) -> PeftModel:
    """Put the adapter on its base model: the one given, the one beside it, or the one it names."""
    beside = folder / BACKBONE_FOLDER
    name = model or (str(beside) if beside.is_dir() else config.base_model_name_or_path)
    if not name:
        raise CommandError("The adapter names no base model. Give it by --model.")
    try:
        backbone = load_backbone(name, dtype)
    except CommandError as error:
        raise error if model else CommandError(f"{error} Or give the adapter's base model by --model.") from error
    with explained(f"The adapter {str(folder)!r} cannot be loaded on {name!r}"):
        return PeftModel.from_pretrained(backbone, str(folder)).eval()


def evaluate(
    model: PeftModel, folder: Path, examples: Dataset, settings: DatasetSettings, batch_size: int
) -> Evaluation:
    """Measure the adapter on the examples whose classes it has learnt, by their names."""
    config = model.peft_config[model.active_adapter]
    classes = list(config.classes or ()) if config.tasks else []
    if not classes:
        raise CommandError("The adapter has learnt no classes yet, so there is nothing to measure. Train it first.")
    with explained(f"The data set {settings.path!r} cannot be used"):
        labels = read_labels(examples, examples, settings.label_column)
        image_column = find_image_column(examples, examples, settings.image_column)
    index = np.array([classes.index(name) if name in classes else -1 for name in labels.names])
    truth = index[labels.test]
    known = np.flatnonzero(truth >= 0)
    if not len(known):
        raise CommandError(
            f"No image of {settings.path!r} is of a class that the adapter has learnt ({_some(classes)}); the classes "
            f"of {settings.label_column!r} are {_some(labels.names)}. Give another data set or --label-column."
        )
    has_processor = any((folder / file).is_file() for file in PROCESSOR_FILES)
    processor = load_processor(str(folder) if has_processor else model.get_base_model().config._name_or_path)
    collator = ContinualCollator(
        ImageTransform(processor), index, image_column, settings.label_column, label_names=labels.names
    )
    predictions = predict(model, DataLoader(examples.select(known), batch_size, collate_fn=collator))
    truth = truth[known]
    correct = predictions == truth
    tasks = {f"task_{number}": _mean(correct[np.isin(truth, rows)]) for number, rows in enumerate(config.tasks)}
    return Evaluation(
        adapter=str(folder),
        dataset=settings.path,
        split=settings.test_split,
        images=len(known),
        left_out=len(examples) - len(known),
        accuracy=float(correct.mean()),
        average_accuracy=float(np.mean([value for value in tasks.values() if value is not None])),
        tasks=tasks,
        classes={name: _mean(correct[truth == row]) for row, name in enumerate(classes)},
    )


@torch.no_grad()
def predict(model: PeftModel, batches: Any) -> np.ndarray:
    """Predicted row of the head for each image, int64, on a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    rows = [
        model(batch["pixel_values"].to(device)).logits.argmax(-1).cpu()
        for batch in tqdm(batches, desc="images", unit="batch", leave=False, dynamic_ncols=True)
    ]
    return torch.cat(rows).numpy()


def _mean(correct: np.ndarray) -> float | None:
    return float(correct.mean()) if correct.size else None


def _some(names: Any) -> str:
    return ", ".join(list(names)[:5]) + (", ..." if len(names) > 5 else "")
