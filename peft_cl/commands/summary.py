"""What the command says at the end of a run: the figures, what they are to be compared with, and what comes next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path

from ..metrics import RunResults, results_table
from ..metrics.chance import chance_level, compared_without_prompts, standard_error
from ..metrics.own import means_over_tasks
from ..text import counted, percent, plain
from ..trainer import ContinualTrainer
from ..trainer.resuming import checkpoint_folder
from ..trainer.snapshot import whole_checkpoint
from .sections import ONLY, DatasetSettings


def summary(results: RunResults) -> str:
    """The run as a table, its metrics, and how good they are."""
    metrics = [
        f"{name.replace('_', ' ')} {percent(value, 2)}%"
        for name, value in results.metrics.items()
        if value == value  # not NaN
    ]
    own = means_over_tasks(results.own_metrics or {})
    metrics += [f"{plain(name).replace('_', ' ')} {value:.4g}" for name, value in own.items() if value == value]
    return "\n".join([results_table([results]), "", ", ".join(metrics), *judged(results)]) + "\n"


def judged(results: RunResults) -> list[str]:
    """A line that compares the average accuracy with guessing, and says what the test images leave open."""
    accuracy, chance, error = results.metrics.get("average_accuracy"), chance_level(results), standard_error(results)
    if accuracy is None or math.isnan(accuracy) or chance is None or error is None:
        return []
    images = sum(results.test_sizes[: results.finished_tasks])
    line = (
        f"average accuracy {percent(accuracy)} ± {percent(error)}% (standard error of {images:,} test images), "
        f"guessing {percent(chance)}%"
    )
    if accuracy - chance < 2 * error:
        line += ": no better than guessing, as far as these images tell. Train longer, or try another learning rate"
    return [f"{line}.", *filter(None, [compared_without_prompts(results)])]


def next_commands(
    results: RunResults,
    folder: Path,
    datasets: Mapping[str, DatasetSettings],
    again: list[str] | None,
    domain_column: str | None = None,
) -> list[str]:
    """The commands that a run is looked at with, as they can be copied.

    Args:
        results: The record of the run.
        folder: Its folder.
        datasets: Its data sets, by name.
        again: The command that trains it anew; `None`: of a run that has no frozen features to be compared with.
        domain_column: Column of the domains, of a run that had some.
    """
    is_by_domain = results.scenario.get("name") == "domain-incremental"
    column = ["--domain-column", domain_column or "domain"] if is_by_domain else []
    lines = [
        ("names for images of your own", ["peft-cl", "predict", str(folder), "IMAGE"]),
        ("the pictures again", ["peft-cl", "plot", str(folder)]),
        *((f"accuracy of each class{where}", words) for where, words in _evaluations(folder, datasets, column)),
    ]
    if again is not None:
        command = [*again, "--method", "frozen", "--preset", "best", "--adapter", "null", "--strategy", "null"]
        command += ["--augmentation", "null", "--output_dir", f"{folder}_frozen"]
        lines.append(("what the backbone gives without prompts: the row to beat", command))
    return ["Next:", *(f"  {shlex.join(words)}    # {what}" for what, words in lines)]


def _evaluations(
    folder: Path, datasets: Mapping[str, DatasetSettings], column: list[str]
) -> list[tuple[str, list[str]]]:
    usual, found = DatasetSettings(path=""), []
    for name, data in datasets.items():
        words = ["peft-cl", "evaluate", str(folder), "--dataset", data.path]
        for option, setting in (
            ("--dataset-name", "name"),
            ("--split", "test_split"),
            ("--label-column", "label_column"),
            ("--image-column", "image_column"),
            ("--test-fraction", "test_fraction"),
            ("--split-seed", "split_seed"),
        ):
            if getattr(data, setting) != getattr(usual, setting):
                words += [option, str(getattr(data, setting))]
        words += [] if name == ONLY else ["--task", name]
        found.append(("" if name == ONLY else f" of {name}", [*words, *column]))
    return found


def going_on(trainer: ContinualTrainer) -> str:
    """Say where a resumed run goes on."""
    done, tasks = trainer.finished_tasks, len(trainer.scenario)
    if done == tasks:
        known = f"{tasks} of {counted(tasks, 'task')} finished"
        return f"{known}: nothing is trained; results, card and pictures are written anew.\n"
    task = trainer.scenario[done]
    checkpoint = whole_checkpoint(checkpoint_folder(trainer.folder, task))
    where = f", after step {checkpoint.name.rpartition('-')[2]}" if checkpoint else ""
    if not done and not checkpoint:
        return f"There is nothing to go on from in {plain(str(trainer.folder))}: it begins with {plain(task.name)}.\n"
    return f"Goes on with {plain(task.name)}{where}: {done} of {counted(tasks, 'task')} finished.\n"
