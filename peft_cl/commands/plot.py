"""`peft-cl plot`: the pictures of a run, or of several runs side by side, from what is on disk."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..disk import local_path
from ..metrics import RunResults, finished_tasks
from ..metrics.table import group_of
from ..plots.run import COMPARISON_CURVES_FILE, COMPARISON_FILE, PICTURE_FILES, write_comparison, write_pictures
from ..strategies import JointTraining
from ..text import percent
from .errors import CommandError, explained
from .output import say
from .sources import RESULTS_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help=f"folder of a run, with its {RESULTS_FILE}")
    parser.add_argument(
        "--output", metavar="FOLDER", help="folder to write (default: one RUN's own; the current one for several)"
    )
    parser.add_argument(
        "--reference",
        metavar="RUN",
        help="a run that kept all data (strategy joint), against which each run's intransigence is printed",
    )
    parser.epilog = (
        f"One RUN: {', '.join(PICTURE_FILES)}; the last three where the run counted which prompts it "
        "chose, where its adapter has keys, and where a temperature was fitted (training.fit_temperature). Several: "
        f"{COMPARISON_FILE} and {COMPARISON_CURVES_FILE}, in which runs that differ in their seed only are one line, "
        "their mean."
    )


def run(arguments: argparse.Namespace) -> None:
    folders = [local_path(name) for name in arguments.runs]
    repeated = [name for name, count in Counter(folder.resolve() for folder in folders).items() if count > 1]
    if repeated:
        raise CommandError(f"The run {str(repeated[0])!r} is given more than once. Give each run once.")
    list_of_results = [read_run(folder) for folder in folders]
    told = told_against(arguments.reference, folders, list_of_results) if arguments.reference else []
    default = folders[0] if len(folders) == 1 else Path()
    output = local_path(arguments.output) if arguments.output else default
    try:
        output.mkdir(parents=True, exist_ok=True)
        if len(folders) == 1:
            files = write_pictures(folders[0], list_of_results[0], output)
        else:
            files = write_comparison(output, tell_apart(folders, list_of_results))
    except (ImportError, ValueError) as error:  # matplotlib is missing, or an adapter is damaged
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(
            f"The pictures cannot be written to {str(output)!r}: {error}. Give a folder that you may write to with "
            "--output."
        ) from error
    say("\n".join([*map(str, files), *told]))


def told_against(reference: str, folders: Sequence[Path], list_of_results: Sequence[RunResults]) -> list[str]:
    """A line for each run: how much it lacks, on tasks just learnt, of what the reference reaches."""
    joint = read_run(local_path(reference))
    lines = []
    for folder, results in zip(folders, list_of_results, strict=True):
        with explained(f"The run in {str(folder)!r} has no intransigence against {reference!r}"):
            lines.append(f"{folder}: intransigence {percent(results.intransigence(joint), 2)}%")
    if JointTraining.name not in joint.method:
        lines.append(
            f"{reference} was learnt by {joint.method}, and not by {JointTraining.name}: against it, this is no "
            "intransigence as papers give it."
        )
    return lines


def read_run(folder: Path) -> RunResults:
    """Read the record of a run that has something to draw.

    Raises:
        CommandError: There is no such folder, no record in it or a damaged one, or no task is finished.
    """
    if not folder.is_dir():
        reason = "that is a file" if folder.exists() else "there is no such folder"
        raise CommandError(f"The run {str(folder)!r} cannot be drawn: {reason}. Give the output folder of a run.")
    if not (folder / RESULTS_FILE).is_file():
        raise CommandError(
            f"The folder {str(folder)!r} has no {RESULTS_FILE}. Give the output folder of a run that has finished a "
            "task."
        )
    with explained(f"The run in {str(folder)!r} cannot be drawn"):
        results = RunResults.load(folder)
        finished = finished_tasks(results.accuracy_matrix)
    if finished == 0:
        raise CommandError(
            f"The run in {str(folder)!r} has finished none of its {len(results.task_names)} tasks, so there is "
            "nothing to draw yet. Draw it once its first task is finished."
        )
    return results


def tell_apart(folders: Sequence[Path], list_of_results: Sequence[RunResults]) -> list[RunResults]:
    """Add the folder's name to the methods of which two runs have one seed: they are settings, and not seeds, of it.

    Otherwise runs of one method are seeds of one line, which must have different seeds.
    """
    counts = Counter((group_of(results), results.seed) for results in list_of_results)
    ambiguous = {group for (group, _), count in counts.items() if count > 1}
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    return [
        dataclasses.replace(results, method=f"{results.method} ({name})")
        if group_of(results) in ambiguous
        else results
        for results, name in zip(list_of_results, names, strict=True)
    ]
