"""`peft-cl predict`: what a saved adapter takes images for, by name."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from ..disk import local_path
from ..predicting import Prediction, classify
from ..scenarios import open_image
from ..text import counted, percent, plain
from .abstain import add_threshold, check_threshold
from .adapters import SavedAdapter
from .errors import CommandError, explained, refuse_below_one, unknown
from .evaluate import add_model_options, load_adapter, processor_of
from .networks import network_of
from .output import complain, say
from .sources import CONFIG_FILE


#: Exit status where an image could not be read; the others are predicted.
SOME_UNREADABLE = 1
#: What a file that cannot be read as an image raises, a bomb included.
UNREADABLE = (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError, MemoryError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter, or its name on the Hub")
    parser.add_argument("images", metavar="IMAGE|FOLDER", nargs="+", help="images, or folders, with all below them")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes to name for each (default: 5)")
    parser.add_argument("--csv", metavar="FILE", help="write a table in place of lines; - is the standard output")
    parser.add_argument("--task", metavar="NAME", help="task of all these images: its classes alone are in question")
    add_threshold(parser)
    add_model_options(parser)
    parser.epilog = (
        "Without --task, the task is the one that brought the best class: the model is not told it. Where each task "
        "has prompts of its own (DualPrompt), the task whose prompts the keys chose is said too. Files that are no "
        f"readable images are named, passed over and counted; the exit status is {SOME_UNREADABLE} then, and 0 "
        "otherwise. In a folder only files with the ending of an image are read."
    )


def run(arguments: argparse.Namespace) -> int:
    for name, value in (("--top-k", arguments.top_k), ("--batch-size", arguments.batch_size)):
        refuse_below_one(name, value)
    check_threshold(arguments.abstain_below)
    if local_path(arguments.adapter).is_file() and any(
        (local_path(name) / CONFIG_FILE).is_file() for name in arguments.images
    ):
        raise CommandError(f"The adapter comes first, but {arguments.adapter!r} is a file. Write ADAPTER IMAGE.")
    check_table(arguments.csv, arguments.images)
    files = find_images(arguments.images)
    adapter = SavedAdapter.read(arguments.adapter)
    if not adapter.config.tasks:
        raise CommandError("The adapter has learnt no classes yet, so it takes images for nothing. Train it first.")
    trust = arguments.trust_remote_code
    model = load_adapter(adapter, arguments.model, arguments.dtype or adapter.dtype, trust)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = processor_of(adapter, model, trust)
    names = adapter.names_of_tasks
    task = find_task(arguments.task, names, model, adapter)
    found, unreadable = [], []
    shown = tqdm(total=len(files), desc="images", unit="image", leave=False, disable=None if len(files) > 1 else True)
    with shown:
        for batch in read_batches(files, arguments.batch_size, unreadable, processor):
            images = [image for _, image in batch]
            known = None if task is None else [task] * len(images)
            predictions = classify(model, images, processor, arguments.top_k, known, arguments.abstain_below)
            found += zip([file for file, _ in batch], predictions, strict=True)
            shown.update(len(found) + len(unreadable) - shown.n)
    if arguments.csv:
        write_table(arguments.csv, found, names, abstaining=arguments.abstain_below is not None)
    else:
        say("\n\n".join(described(file, prediction, names) for file, prediction in found))
    for file, fault in unreadable:
        complain(f"{file} is passed over, it cannot be read as an image: {plain(fault, 300)}")
    summary = f"{len(found)} of {counted(len(files), 'image')} predicted"
    if unreadable:
        complain(f"{summary}, {len(unreadable)} passed over. Mend or remove the files named.")
        return SOME_UNREADABLE
    if arguments.csv not in (None, "-"):
        say(f"{summary}; the table is in {arguments.csv}.")
    return 0


def find_task(name: str | None, names: Sequence[str], model: PeftModel, adapter: SavedAdapter) -> int | None:
    """The number of the task that the user names; the model becomes its network, where each task has one.

    Raises:
        CommandError: There is no such task, or none is named where the model must be told.
    """
    apply_task = network_of(adapter.folder)
    if name is None and apply_task is None:
        return None
    if name is None:
        raise CommandError(
            f"The adapter {adapter.name!r} holds a network for each task. Say which one the images belong to: --task, "
            f"one of {', '.join(map(plain, names))}."
        )
    if name not in names:
        raise unknown("task", name, names)
    number = names.index(name)
    if apply_task is not None:
        with explained(f"The network of the task {name!r} cannot be used"):
            apply_task(model, adapter.folder, number)
    return number


def check_table(place: str | None, images: Sequence[str]) -> None:
    """Refuse to write a table over something else."""
    if place in (None, "-") or not local_path(place).is_file():
        return
    if local_path(place).suffix.lower() not in (".csv", ".tsv") or place in images:
        raise CommandError(
            f"--csv is {place!r}, a file that is there and is no table. Give another name, such as predictions.csv."
        )


def find_images(names: Sequence[str]) -> list[Path]:
    """The files given, and those below the folders given that have an image's ending, in order.

    Raises:
        CommandError: There is no such file or folder, or no image in a folder.
    """
    endings, files = Image.registered_extensions(), []
    for name in names:
        path = local_path(name)
        if path.is_dir():
            below = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings and file.is_file())
            if not below:
                raise CommandError(
                    f"The folder {str(path)!r} holds no image. Give a folder with files such as cat.jpg."
                )
            files += below
        elif path.is_file():
            files.append(path)
        else:
            raise CommandError(f"There is no image or folder {name!r}. Correct the path.")
    return files


def read_batches(
    files: Sequence[Path], size: int, unreadable: list[tuple[Path, Exception]], processor: Any
) -> Iterator[list[tuple[Path, Image.Image]]]:
    """Images in batches, as training sees them; files that cannot be read are added to `unreadable`."""
    batch: list[tuple[Path, Image.Image]] = []
    for file in files:
        try:
            batch.append((file, open_image(file, processor)))
        except UNREADABLE as error:
            unreadable.append((file, error))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def task_name(task: int | None, names: Sequence[str]) -> str:
    return "" if task is None else names[task]


def described(file: Path, prediction: Prediction, names: Sequence[str]) -> str:
    """An image's file, the task it is taken for, and a line for each class."""
    task = plain(task_name(prediction.task, names))
    if prediction.expert_task is not None:
        task += f"; expert of {plain(names[prediction.expert_task])}"
    classes = zip(prediction.names, prediction.probabilities, strict=True)
    return "\n".join(
        [
            f"{file}" + (f"  (task {task})" if task else "") + ("  (abstains)" if prediction.abstains else ""),
            *(f"  {percent(probability):>5}%  {plain(name)}" for name, probability in classes),
        ]
    )


def write_table(
    place: str, found: Sequence[tuple[Path, Prediction]], names: Sequence[str], abstaining: bool = False
) -> None:
    """A line for each image: file, task, the task whose prompts were chosen and whether the model abstains where there
    is such a thing, and name and probability of each class, the best first."""
    most = max((len(prediction.names) for _, prediction in found), default=1)
    more: dict[str, Callable[[Prediction], str]] = {}
    if any(prediction.expert_task is not None for _, prediction in found):
        more["expert_task"] = lambda prediction: task_name(prediction.expert_task, names)
    if abstaining:
        more["abstains"] = lambda prediction: str(prediction.abstains).lower()
    ranked = (f"{what}_{rank}" for rank in range(1, most + 1) for what in ("class", "probability"))
    header = ["file", "task", *more, *ranked]
    rows = [
        [
            str(file),
            task_name(prediction.task, names),
            *(tell(prediction) for tell in more.values()),
            *(cell for pair in zip(prediction.names, prediction.probabilities, strict=True) for cell in pair),
        ]
        for file, prediction in found
    ]
    if place == "-":
        csv.writer(sys.stdout, lineterminator="\n").writerows([map(plain, row) for row in [header, *rows]])
        return
    path = local_path(place)
    with explained(f"The table cannot be written to {place!r}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
            csv.writer(stream).writerows([header, *rows])
