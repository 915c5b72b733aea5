"""`peft-cl evaluate`: measure a saved adapter on a data set, overall, by task and by class."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel

from ..metrics import task_identification_accuracy
from ..text import counted, percent, plain
from . import abstain, ensembles
from . import unknown as unknown_images
from .adapters import SavedAdapter
from .data_options import add_data_options, data_settings
from .errors import CommandError, explained, refuse_below_one
from .learnt_images import learnt_images
from .networks import network_of
from .output import say, say_json
from .sections import DatasetSettings, ModelSettings
from .sources import load_data, load_processor, split_of
from .tasks import task_of_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter, or its name on the Hub")
    add_data_options(parser)
    parser.add_argument(
        "--domain-column", metavar="NAME", help="column of the domains, where tasks share their classes"
    )
    parser.add_argument(
        "--task", metavar="NAME", help="task that the data set was in a dataset-sequence, whose classes bear its name"
    )
    ensembles.add_arguments(parser)
    unknown_images.add_arguments(parser)
    abstain.add_coverage(parser)
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")


def add_model_options(parser: argparse.ArgumentParser, batch_size: bool = True) -> None:
    """Options of what the adapter is put on, which `load_adapter` takes; of a batch its size, where there are any."""
    parser.add_argument("--model", metavar="NAME", help="base model; default: the one that the adapter names")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as in training")
    if batch_size:
        parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images in a batch (default: 64)")
    add_trust_option(parser)


def add_trust_option(parser: argparse.ArgumentParser) -> None:
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
    ensemble: str | None = None  # what is asked in the place of the adapter alone
    coverage: dict[str, float] | None = None  # accuracy on so many percent of the images, those it is surest of
    unknown: dict[str, Any] | None = None  # what `measure_unknown` found

    def __str__(self) -> str:
        known = ", task known" if self.task_known else ""
        lines = [f"{self.adapter} on {self.dataset}, {self.split}: {counted(self.images, 'image')}{known}"]
        if self.ensemble:
            lines += [f"ensemble: {self.ensemble}"]
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
        if self.coverage:
            lines += ["", *abstain.described(self.coverage)]
        if self.unknown:
            lines += ["", *unknown_images.described(self.unknown)]
        return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    refuse_below_one("--batch-size", arguments.batch_size)
    adapter = SavedAdapter.read(arguments.adapter)
    settings = data_settings(arguments)
    examples = split_of(load_data(settings), settings, "test_split")
    others = arguments.unknown and unknown_images.load_unknown(
        arguments.unknown, adapter, settings, examples, arguments.task
    )
    trust = arguments.trust_remote_code
    dtype = arguments.dtype or adapter.dtype
    model, of_task = load_networks(adapter, arguments.model, dtype, trust)
    if others and of_task:
        raise CommandError(
            f"The adapter {adapter.name!r} holds a network for each task, and none for images of no task. Leave out "
            "--unknown."
        )
    with ensembles.ensemble(model, adapter, arguments, networks=of_task is not None) as (model, adapter, words):
        evaluation = evaluate(
            model,
            adapter,
            examples,
            settings,
            arguments.domain_column,
            arguments.batch_size,
            arguments.task,
            trust,
            of_task,
            coverage=arguments.coverage,
            unknown=others,
            ensemble=words,
        )
    if arguments.json:
        say_json(vars(evaluation))
    else:
        say(evaluation)


def load_adapter(
    adapter: SavedAdapter,
    model: str | None,
    dtype: str,
    trust_remote_code: bool = False,
    *,
    is_trainable: bool = False,
    adapter_name: str = "default",
) -> PeftModel:
    """Put the adapter on its base model, or on the one given in its place."""
    name = model or adapter.base_model
    if not name:
        raise CommandError("The adapter names no base model. Give it by --model.")
    backbone = adapter.load_base(name, dtype, trust_remote_code=trust_remote_code)
    with explained(f"The adapter {str(adapter.folder)!r} cannot be loaded on {name!r}"):
        return PeftModel.from_pretrained(backbone, str(adapter.folder), adapter_name, is_trainable=is_trainable).eval()


def processor_of(adapter: SavedAdapter, model: PeftModel, trust_remote_code: bool = False) -> Any:
    """The image processor that the adapter was learnt with, or else that of the base model it is on."""
    place = adapter.processor or model.get_base_model().config._name_or_path
    return load_processor(place, trust_remote_code=trust_remote_code)


def load_networks(
    adapter: SavedAdapter, model: str | None, dtype: str, trust_remote_code: bool = False
) -> tuple[PeftModel, Callable[[int], PeftModel] | None]:
    """The adapter on its base model, and what gives the model of a task, where each has a network of its own."""
    loaded, apply_task = load_adapter(adapter, model, dtype, trust_remote_code), network_of(adapter.folder)

    def of_task(number: int) -> PeftModel:
        alone = load_adapter(adapter, model, dtype, trust_remote_code)
        apply_task(alone, adapter.folder, number)
        return alone

    return loaded, of_task if apply_task else None


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
    *,
    coverage: bool = False,
    unknown: unknown_images.UnknownImages | None = None,
    ensemble: str | None = None,
) -> Evaluation:
    """Measure the adapter on the examples whose classes it has learnt, by their names; those that the classes have in
    the data sets' `task`, where it was learnt from a sequence of several. `of_task` gives the model of a task, where
    each has a network of its own; `coverage` and `unknown` ask for more, and `ensemble` says what the model is."""
    known = learnt_images(
        model, adapter, examples, settings, domain_column, task, trust_remote_code, task_networks=of_task is not None
    )
    truth, tasks, task_known = known.truth, known.tasks, known.task_known
    rows, confidence = known.ask(model, of_task, batch_size, abstain.answers_and_confidence).T
    predicted = rows.astype(np.int64)
    correct = predicted == truth
    accuracies = {name: _mean(correct[tasks.numbers == number]) for number, name in enumerate(tasks.names)}
    identified = None
    if tasks.names and domain_column is None and not task_known:
        identified = task_identification_accuracy(predicted, tasks.numbers, task_of_rows(adapter))
    measured = [value for value in accuracies.values() if value is not None]
    return Evaluation(
        adapter=str(adapter.folder),
        dataset=settings.path,
        split=settings.test_split,
        images=len(truth),
        left_out=known.left_out,
        task_known=task_known,
        accuracy=float(correct.mean()),
        average_accuracy=float(np.mean(measured)) if measured else None,
        task_identification=identified,
        tasks=accuracies or None,
        tasks_missing=tasks.missing,
        classes={name: _mean(correct[truth == row]) for row, name in enumerate(adapter.config.classes)},
        ensemble=ensemble,
        coverage=abstain.coverage_table(confidence, correct) if coverage else None,
        unknown=unknown and unknown_images.measure_unknown(model, known, unknown, batch_size),
    )


def _mean(correct: np.ndarray) -> float | None:
    return float(correct.mean()) if correct.size else None


def _percent(value: float | None) -> str:
    return f"{'–':>8}" if value is None else f"{percent(value, 2) + '%':>8}"
