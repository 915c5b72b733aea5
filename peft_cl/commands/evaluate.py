"""`peft-cl evaluate`: measure a saved adapter on a data set, overall, by task and by class."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from ..metrics import task_identification_accuracy
from ..scenarios import ContinualCollator, ImageTransform
from ..scenarios.columns import find_image_column, read_labels
from ..text import counted, percent, plain
from ..trainer.bad_images import BadImageError, ImageReader
from ..trainer.examples import TaskExamples
from .adapters import SavedAdapter
from .data_options import add_data_options, data_settings
from .errors import CommandError, explained, some
from .networks import network_of
from .output import say, say_json
from .sections import DatasetSettings, ModelSettings
from .sources import RESULTS_FILE, load_data, load_processor, split_of
from .tasks import find_tasks, names_of_classes, sequence_of, task_of_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter, or its name on the Hub")
    add_data_options(parser)
    parser.add_argument(
        "--domain-column", metavar="NAME", help="column of the domains, where tasks share their classes"
    )
    parser.add_argument(
        "--task", metavar="NAME", help="task that the data set was in a dataset-sequence, whose classes bear its name"
    )
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of what the adapter is put on, which `load_adapter` takes."""
    parser.add_argument("--model", metavar="NAME", help="base model; default: the one that the adapter names")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as in training")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images in a batch (default: 64)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help=ModelSettings.__dataclass_fields__["trust_remote_code"].metadata["help"],
    )


@dataclass(frozen=True)
class Evaluation:
    """What was measured; accuracies from 0 to 1, a task's or class's `None` where the data has no image of it."""

    adapter: str
    dataset: str
    split: str
    images: int
    left_out: int  # images of classes or domains that the adapter has not learnt
    task_known: bool  # whether the model is told the task of each image, as in a task-incremental run
    accuracy: float
    average_accuracy: float | None  # mean over the tasks, the figure that runs are compared by
    task_identification: float | None  # share of images given a class of their own task; None: told, or not by classes
    tasks: dict[str, float | None] | None
    tasks_missing: str | None  # why there are none
    classes: dict[str, float | None]

    def __str__(self) -> str:
        known = ", task known" if self.task_known else ""
        lines = [f"{self.adapter} on {self.dataset}, {self.split}: {counted(self.images, 'image')}{known}"]
        if self.left_out:
            lines += [f"left out: {counted(self.left_out, 'image')} of classes or domains that it has not learnt"]
        lines += [
            "",
            f"accuracy          {_percent(self.accuracy)}  (of all images)",
            f"average accuracy  {_percent(self.average_accuracy)}  (mean over the tasks)",
        ]
        if self.task_identification is not None:
            lines += [f"task identified   {_percent(self.task_identification)}  (a class of the image's own task)"]
        if self.tasks_missing:
            lines += [f"no task by itself: {self.tasks_missing}"]
        for heading, entries in (("task", self.tasks or {}), ("class", self.classes)):
            shown = [(plain(name, 60), _percent(value)) for name, value in entries.items()]
            width = max(map(len, [heading, *(name for name, _ in shown)]))
            lines += ["", f"{heading:<{width}}  accuracy"] if entries else []
            lines += [f"{name:<{width}}  {value}" for name, value in shown]
        return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    if arguments.batch_size < 1:
        raise CommandError(f"--batch-size is {arguments.batch_size}, but must be at least 1.")
    adapter = SavedAdapter.read(arguments.adapter)
    settings = data_settings(arguments)
    examples = split_of(load_data(settings), settings, "test_split")
    trust = arguments.trust_remote_code
    dtype = arguments.dtype or adapter.dtype
    model = load_adapter(adapter, arguments.model, dtype, trust)
    apply_task = network_of(adapter.folder)

    def of_task(number: int) -> PeftModel:
        alone = load_adapter(adapter, arguments.model, dtype, trust)
        apply_task(alone, adapter.folder, number)
        return alone

    evaluation = evaluate(
        model,
        adapter,
        examples,
        settings,
        arguments.domain_column,
        arguments.batch_size,
        arguments.task,
        trust,
        of_task if apply_task else None,
    )
    if arguments.json:
        say_json(vars(evaluation))
    else:
        say(evaluation)


def load_adapter(adapter: SavedAdapter, model: str | None, dtype: str, trust_remote_code: bool = False) -> PeftModel:
    """Put the adapter on its base model, or on the one given in its place."""
    name = model or adapter.base_model
    if not name:
        raise CommandError("The adapter names no base model. Give it by --model.")
    backbone = adapter.load_base(name, dtype, trust_remote_code=trust_remote_code)
    with explained(f"The adapter {str(adapter.folder)!r} cannot be loaded on {name!r}"):
        return PeftModel.from_pretrained(backbone, str(adapter.folder)).eval()


def evaluate(
    model: PeftModel,
    adapter: SavedAdapter,
    examples: Dataset,
    settings: DatasetSettings,
    domain_column: str | None,
    batch_size: int,
    task: str | None = None,
    trust_remote_code: bool = False,
    of_task: Callable[[int], PeftModel] | None = None,
) -> Evaluation:
    """Measure the adapter on the examples whose classes it has learnt, by their names; those that the classes have in
    the data sets' `task`, where it was learnt from a sequence of several. `of_task` gives the model of a task, where
    each has a network of its own."""
    classes = list(adapter.config.classes or ()) if adapter.config.tasks else []
    if not classes:
        raise CommandError("The adapter has learnt no classes yet, so there is nothing to measure. Train it first.")
    with explained(f"The data set {settings.path!r} cannot be used"):
        labels = read_labels(examples, examples, settings.label_column)
        image_column = find_image_column(examples, examples, settings.image_column)
    names = names_of_classes(adapter, labels.names, task)
    index = np.array([classes.index(name) if name in classes else -1 for name in names])
    truth = index[labels.test]
    if not (truth >= 0).any():
        raise CommandError(
            f"No image of {settings.path!r} is of a class that the adapter has learnt ({some(classes)}); the classes "
            f"of {settings.label_column!r} are {some(names)}. Give another data set or --label-column"
            + (f", or --task, one of {', '.join(sequence_of(adapter))}." if sequence_of(adapter) else ".")
        )
    tasks = find_tasks(adapter, examples, truth, domain_column)
    known = np.flatnonzero((truth >= 0) & (tasks.numbers >= 0))
    truth, numbers = truth[known], tasks.numbers[known]
    place = adapter.processor or model.get_base_model().config._name_or_path
    processor = load_processor(place, trust_remote_code=trust_remote_code)
    with explained(f"The image processor of {place!r} cannot be used"):
        transform = ImageTransform(processor)
    collator = ContinualCollator(transform, index, image_column, settings.label_column, label_names=labels.names)
    images = TaskExamples(
        [examples.select(known)],
        {"model_label": torch.from_numpy(truth)},
        reader=ImageReader(image_column, transform.to_rgb, "Mend the file or remove it from the data.", known),
        names=[(task, settings.test_split)],
    )
    task_known = adapter.scenario == "task-incremental" and bool(tasks.names)
    if of_task is not None and not task_known:
        raise CommandError(
            f"The adapter {adapter.name!r} holds a network for each task, but the record beside it, which tells the "
            f"tasks of the classes, is missing. Put its {RESULTS_FILE} there."
        )
    predicted = np.zeros_like(truth)
    # All images by one model, or those of each task by its own.
    parts = [slice(None)] if of_task is None else [numbers == number for number in np.unique(numbers)]
    try:
        for part in parts:
            own = model if of_task is None else of_task(int(numbers[part][0]))
            rows = np.arange(len(truth))[part].tolist()
            batches = DataLoader(Subset(images, rows), batch_size, collate_fn=collator)
            predicted[part] = predict(own, batches, numbers[part] if task_known else None)
    except BadImageError as error:
        raise CommandError(str(error)) from error
    correct = predicted == truth
    accuracies = {name: _mean(correct[numbers == number]) for number, name in enumerate(tasks.names)}
    identified = None
    if tasks.names and domain_column is None and not task_known:
        identified = task_identification_accuracy(predicted, numbers, task_of_rows(adapter))
    measured = [value for value in accuracies.values() if value is not None]
    return Evaluation(
        adapter=str(adapter.folder),
        dataset=settings.path,
        split=settings.test_split,
        images=len(known),
        left_out=len(examples) - len(known),
        task_known=task_known,
        accuracy=float(correct.mean()),
        average_accuracy=float(np.mean(measured)) if measured else None,
        task_identification=identified,
        tasks=accuracies or None,
        tasks_missing=tasks.missing,
        classes={name: _mean(correct[truth == row]) for row, name in enumerate(classes)},
    )


@torch.no_grad()
def predict(model: PeftModel, batches: DataLoader, tasks: np.ndarray | None) -> np.ndarray:
    """Predicted row of the head for each image, int64, on a GPU where there is one.

    Args:
        model: The adapter on its base model.
        batches: The images, in order.
        tasks: The task of each image, among whose classes the prediction then is.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    parts = itertools.repeat(None) if tasks is None else torch.from_numpy(tasks).split(batches.batch_size)
    shown = tqdm(batches, desc="images", unit="batch", leave=False, dynamic_ncols=True, disable=None)
    rows = [
        model(batch["pixel_values"].to(device), task_ids=task_ids).logits.argmax(-1).cpu()
        for batch, task_ids in zip(shown, parts, strict=False)  # the repetition has no end
    ]
    return torch.cat(rows).numpy()


def _mean(correct: np.ndarray) -> float | None:
    return float(correct.mean()) if correct.size else None


def _percent(value: float | None) -> str:
    return f"{'–':>8}" if value is None else f"{percent(value, 2) + '%':>8}"
