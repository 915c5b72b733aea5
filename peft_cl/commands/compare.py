"""`peft-cl compare`: a matrix of runs, done, resumed and put into tables, as the file of a suite says."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..disk import local_path
from ..scenarios import Scenario
from ..text import counted
from ..trainer.checks import check_fit
from ..trainer.strategy import Combined
from .bars import no_bars
from .errors import CommandError, explained
from .options import apply_overrides, parse_yaml, read_config
from .output import say
from .settings import RunSettings, make_settings
from .sources import load_backbone
from .suites.launchers import in_work, make_launcher
from .suites.report import write_report
from .suites.running import check_same, finished, run_all
from .suites.suite import Row, Run, Suite, SuiteSettings, read_suite
from .train import make_scenario, put_adapter_on, refuse_own_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "suites", metavar="SUITE.yaml", nargs="+", help="methods, seeds and tables; examples/suites has some"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--launcher",
        default="processes",
        choices=["processes", "slurm", "submitit"],
        help="where runs are done: processes of this machine, jobs of a Slurm cluster, or submitit's own processes",
    )
    parser.add_argument(
        "--launcher-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of a cluster's jobs, as submitit names them, such as slurm_partition=gpu or timeout_min=600",
    )
    parser.add_argument("--tables", action="store_true", help="run nothing: only write the tables of what is there")
    parser.add_argument("--check", action="store_true", help="run nothing: only check the suite and list its runs")
    parser.add_argument("--overwrite", action="store_true", help="remove the suite's runs and begin anew")
    parser.add_argument("--quiet", action="store_true", help="say nothing while it runs")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change the suite by a dotted name, with a value in YAML: --set defaults.training.num_train_epochs=1",
    )
    parser.epilog = (
        "Each run is a `peft-cl train` with a folder of its own. Given again after an interruption, the command goes "
        "on, and repeats nothing that is finished. Several commands, on several machines with one disk, share the "
        "runs. The exit status is 1 if a run failed."
    )


def run(arguments: argparse.Namespace) -> int:
    """Check all suites, then run one after the other; the exit status is 1 if a run failed."""
    if arguments.jobs < 1:
        raise CommandError(f"--jobs is {arguments.jobs}, but must be a whole number of at least 1.")
    changes = pairs("--set", arguments.set, "'seeds=[0]'")
    options = pairs("--launcher-option", arguments.launcher_option, "timeout_min=600")
    suites = [read(path, changes) for path in arguments.suites]
    refuse_one_folder(suites)
    if arguments.tables:
        return max(finish(suite, []) for suite in suites)
    no_bars()  # those of a run are in its log, and others would be drawn over what is told here
    if not arguments.quiet:
        rows = sum(len(suite.rows) for suite in suites)
        say(f"Looking for faults in {counted(rows, 'row')} before anything is run.", flush=True)
    for suite in suites:
        check_folder(suite)
        for each in suite.runs if not arguments.overwrite else ():
            check_same(each)
        check_rows(suite, anew=arguments.overwrite)
    if arguments.check:
        for suite in suites:
            say("\n".join(each.title for each in suite.runs))
            say(f"{counted(len(suite.runs), 'run')} of {counted(len(suite.rows), 'row')}: nothing wrong was found.")
        return 0
    for suite in suites if arguments.overwrite else ():
        remove_runs(suite)
    status = 0
    for suite in suites:
        with explained(f"output_dir {str(suite.folder)!r} cannot be written to"):
            (suite.folder / "runs").mkdir(parents=True, exist_ok=True)
        launcher = make_launcher(arguments.launcher, arguments.jobs, suite.folder / "jobs", options)
        status = max(status, finish(suite, run_told(suite, launcher, arguments.quiet)))
    return status


def run_told(suite: Suite, launcher: Any, quiet: bool) -> list[Run]:
    """Run what is left; of an interruption, say how far it is and what goes on."""
    try:
        return run_all(suite, launcher, quiet)
    except KeyboardInterrupt:
        done = sum(finished(each) is not None for each in suite.runs)
        say(f"{done} of {counted(len(suite.runs), 'run')} finished. The same command goes on.", sys.stderr)
        raise


def check_folder(suite: Suite) -> None:
    """Refuse an output folder that cannot be made or written to."""
    folder = suite.folder.absolute()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise CommandError(f"output_dir is {str(suite.folder)!r}, but {str(there)!r} is a file. Give another name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CommandError(
            f"output_dir is {str(suite.folder)!r}, but {str(there)!r} may not be written to. Give another one."
        )


def remove_runs(suite: Suite) -> None:
    """Remove all runs in the suite's folder, unless a process has one in work."""
    runs = suite.folder / "runs"
    held = next((each for each in sorted(runs.glob("*/*.lock")) if in_work(each)), None)
    if held is not None:
        raise CommandError(
            f"--overwrite would remove {str(held.with_suffix(''))!r}, which a process has in work. Wait for its end, "
            "end it, or leave out --overwrite."
        )
    with explained(f"The runs in {str(runs)!r} cannot be removed"):
        if runs.exists():
            shutil.rmtree(runs)


def read(path: str, changes: Sequence[tuple[str, Any]]) -> Suite:
    """The suite in a file, with changes by dotted names."""
    config = read_config(path)
    apply_overrides(config, changes, SuiteSettings.__dataclass_fields__)
    if isinstance(config.get("output_dir"), str) and config["output_dir"]:
        config["output_dir"] = str(local_path(config["output_dir"]))
    return read_suite(config)


def refuse_one_folder(suites: Sequence[Suite]) -> None:
    """Two suites in one folder would write over each other's tables."""
    folders = [str(suite.folder) for suite in suites]
    for folder in folders:
        if folders.count(folder) > 1:
            raise CommandError(f"Two suites have the output_dir {folder!r}. Give each its own.")


def pairs(option: str, given: Sequence[str], example: str) -> list[tuple[str, Any]]:
    """The words `NAME=VALUE` of an option, their values read as YAML."""
    found = []
    for word in given:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise CommandError(f"{option} is {word!r}, but must be NAME=VALUE. Write such as {option} {example}.")
        found.append((name, parse_yaml(value, f"The value of {option} {name}")))
    return found


def check_rows(suite: Suite, anew: bool = False) -> None:
    """Refuse what would fail in the middle: every row's settings, and its model, data and strategy together.

    Rows whose runs are all finished are left out, unless they begin anew.
    """
    left = [each for each in suite.runs if anew or finished(each) is None]
    first = {each.row.folder: each for each in reversed(left)}  # of each row one, of the first seed
    ready = []
    for each in first.values():
        with told_of(each.row):
            ready.append((each.row, make_settings(dict(each.config))))
    scenarios: dict[str, Scenario] = {}
    for row, settings in ready:
        with told_of(row):
            check_row(settings, scenarios)


def check_row(settings: RunSettings, scenarios: dict[str, Scenario]) -> None:
    """What the trainer would refuse before its first task; data that rows have in common is read once."""
    refuse_own_source(settings)
    key = repr((settings.datasets, settings.scenario))
    if key not in scenarios:
        scenarios[key] = make_scenario(settings)
    base = settings.model
    backbone = load_backbone(base.name, base.dtype, base.attn_implementation, base.trust_remote_code)
    with explained("it cannot be set up"):
        model, strategy = put_adapter_on(backbone, settings, scenarios[key]), Combined(settings.strategies)
        check_fit(model, settings.training, scenarios[key], strategy)
        strategy.prepare(model)  # which some refuse


@contextmanager
def told_of(row: Row) -> Iterator[None]:
    """Say of a fault inside the block in which row it is."""
    try:
        yield
    except CommandError as error:
        raise CommandError(f"{row.title}: {error}") from error


def finish(suite: Suite, failed: Sequence[Any]) -> int:
    """Write the report, and say what there is."""
    if not any(finished(each) for each in suite.runs):
        if failed:
            raise CommandError(f"All runs failed. Correct what the log of the first says: {failed[0].file('.log')}")
        raise CommandError(
            f"No run of the suite in {str(suite.folder)!r} is finished, so there is nothing to show. Call the command "
            "without --tables first."
        )
    tables, files = write_report(suite, failed)
    say("\n\n".join(table.markdown() for table in tables))
    say("\n" + "\n".join(map(str, files)))
    for each in failed:
        say(f"Failed: {each.title}; see {each.file('.log')}")
    return 1 if failed else 0
