"""`peft-cl tune`: search settings of a run on held-out training images of its first tasks."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from ..hub.terms import METRICS
from .errors import CommandError
from .tune_input import DEFAULTS, TASKS


#: Options without a value, and those with one that are no settings.
FLAGS = ("--overwrite", "--resume", "--prune")
OPTIONS = ("--search", "--jobs", *(f"--{name.replace('_', '-')}" for name in DEFAULTS if name != "prune"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG.yaml",
        help="the run, with a section search. With --resume also the folder of a search",
    )
    parser.add_argument("--search", metavar="FILE", help="file with the section search, where CONFIG.yaml has none")
    numbers = {
        "trials": (int, "trials in all; a resumed search goes on to as many"),
        "tasks": (int, f"first tasks that a trial learns (default: {TASKS}, or all of fewer; a stream whole)"),
        "holdout": (float, "share of each class's training images that is held out to judge by"),
        "holdout_seed": (int, "draws these, the same for all trials"),
        "seeds": (int, "training seeds of a trial, which is judged by their mean"),
        "sampler_seed": (int, "draws the trials: the same seeds give the same search"),
    }
    for name, (kind, text) in numbers.items():
        default = "" if DEFAULTS[name] is None else f" (default: {DEFAULTS[name]})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text + default)
    parser.add_argument(
        "--metric", metavar="NAME", help=f"what is judged by (default: {DEFAULTS['metric']}): {', '.join(METRICS)}"
    )
    parser.add_argument(
        "--prune", action="store_true", default=None, help="give trials up that are worse than the median after a task"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="trials at once, each in a process; GPUs are dealt out in turn. What is drawn then depends on which "
        "trial is over first, so that another search of the same seeds may differ (default: 1)",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace the search that is in the output folder")
    existing.add_argument("--resume", action="store_true", help="go on with the search in the output folder")
    parser.epilog = (
        "search maps dotted names of settings to a range, {low: 1.0e-4, high: 1.0e-1, log: true} or {low: "
        "5, high: 50, step: 5}, or to a list of values. Test images are not read. Any other setting may be changed by "
        "its dotted name: --training.num_train_epochs 2. trials.csv has all trials, best.yaml is a configuration for "
        "peft-cl train."
    )


def run(arguments: argparse.Namespace, overrides: Sequence[tuple[str, Any]], command: str) -> None:
    """Refuse to search without optuna, or in one of several processes of a launcher; then search."""
    if importlib.util.find_spec("optuna") is None:
        raise CommandError('peft-cl tune needs optuna, which is not installed: pip install "peft-cl[tune]".')
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError(
            f"The command was started as {os.environ['WORLD_SIZE']} processes, each of which would search for itself. "
            "Start it once, with --jobs for several trials at once."
        )
    from .tune_run import run as search  # which needs optuna

    search(arguments, overrides, command)
