"""How `peft-cl tune` searches: the trials, what is said of them, and what is written."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..disk import local_path, replacing
from ..metrics import RunResults, standard_error
from ..scenarios import Scenario
from ..text import counted, percent, plain
from ..trainer.files import remove
from ..tuning.report import CSV_FILE, JSON_FILE, Progress, best_table, counted_states, write_tables
from ..tuning.search import FILE, Row, Search, differences, kept_facts
from ..tuning.space import Dimension, parse_space
from ..tuning.workers import Runner, surroundings
from .bars import no_bars
from .errors import CommandError, explained
from .given import FILE as GIVEN_FILE
from .given import recall, remember
from .importing import IMPORTED, import_all
from .options import apply_overrides, write_yaml
from .output import say
from .settings import SECTIONS, make_settings
from .sources import CONFIG_FILE, RESULTS_FILE
from .train import refuse_own_source
from .trial import Plan, Trials, free_memory
from .tune_input import (
    LOWER_IS_BETTER,
    OF_SEVERAL_TASKS,
    TASKS,
    Options,
    check_edges,
    check_names,
    resolved,
    search_file,
    with_settings,
)


BEST_FILE, BEST_FOLDER, TRIALS_FOLDER = "best.yaml", "best", "trials"


def run(arguments: argparse.Namespace, overrides: Sequence[tuple[str, Any]], command: str) -> None:
    """Check everything, then make the trials, then write tables and the best configuration."""
    config, overrides = recall(arguments.config, overrides, arguments.resume)
    if arguments.search is not None:
        config["search"] = search_file(arguments.search, config)
    given = deepcopy(config)
    with explained("The search cannot be made"):
        space = parse_space(config.pop("search", None))
    apply_overrides(config, overrides, SECTIONS)
    check_names(space, config)
    examples = check_edges(config, space)
    base = make_settings(examples[0])
    folder = Path(base.output_dir)
    if base.training.hub_token:  # best.yaml names the command
        command = command.replace(base.training.hub_token, "***")
    refuse_own_source(base)
    refuse_existing(folder, arguments)
    with explained("--resume does not work"):
        kept = kept_facts(folder) or {} if arguments.resume else {}
    options = resolved(arguments, kept)
    if options.metric == "forward_transfer" and not base.training.measure_ahead:
        raise CommandError("--metric is forward_transfer, which only training.measure_ahead measures. Set it to true.")
    trials = make_trials(examples, folder, options, base.training.seed)
    refuse_single_task(options.metric, trials.plan.tasks)
    rehearse(trials, examples, options.jobs)
    facts = facts_of(config, space, trials, options)
    refuse_another(kept, facts)
    say(describe(space, trials, options, folder), flush=True)
    if arguments.overwrite:
        clear(folder)
    search = open_search(folder, space, options, facts)
    remember(folder, given, overrides)
    make_all(search, trials, options, lambda: write_tables(folder, search.rows(), facts))
    say(finish(folder, search, config, options, command))


def refuse_existing(folder: Path, arguments: argparse.Namespace) -> None:
    """Refuse to write over an earlier search, or beside a run."""
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"output_dir is {str(folder)!r}, but that is a file. Give another name.")
    found = [name for name in (RESULTS_FILE, CONFIG_FILE) if (folder / name).exists()]
    if found:
        raise CommandError(
            f"The output folder {str(folder)!r} holds a run of peft-cl train ({', '.join(found)}). Give another "
            "output_dir."
        )
    if (folder / FILE).exists() and not (arguments.resume or arguments.overwrite):
        raise CommandError(
            f"The output folder {str(folder)!r} holds a search already ({FILE}). Give another output_dir, --resume to "
            "go on with it, or --overwrite to replace it."
        )


def refuse_single_task(metric: str, tasks: int) -> None:
    """Refuse to judge by what is 0 for any single task."""
    if tasks == 1 and metric in OF_SEVERAL_TASKS:
        raise CommandError(
            f"--metric is {metric}, which is 0 after a single task, so that no trial would be better than another. "
            "Give another, or --tasks of at least 2."
        )


# ----------------------------------------------------------------------------------------------- the trials


def make_trials(examples: Sequence[dict[str, Any]], folder: Path, options: Options, seed: int) -> Trials:
    """Load the data, and hold images out of it; every fault of the data shows here."""
    seeds = tuple(seed + number for number in range(options.seeds))
    # What a trial tries replaces what the example has of it.
    plan = Plan(0, options.holdout, options.holdout_seed, seeds, options.metric, folder / TRIALS_FOLDER)
    trials = Trials(examples[0], plan)
    trials.plan = replace(plan, tasks=usual_tasks(trials.whole) if options.tasks is None else options.tasks)
    _ = trials.scenario  # read now: it may not have as many tasks
    return trials


def usual_tasks(scenario: Scenario) -> int:
    return min(TASKS, len(scenario)) if scenario.boundaries else len(scenario)


def rehearse(trials: Trials, examples: Sequence[dict[str, Any]], jobs: int) -> None:
    """Put a trainer together before the first trial: a model, a processor or images that do not fit are told once."""
    if jobs > 1 and torch.cuda.device_count() > 1:
        return  # of which this process would have to choose one
    faults = []
    for example in itertools.islice(examples, 3):
        folder = trials.plan.folder / "0000"
        try:
            trials.trainer(example, trials.plan.seeds[0], folder)
            return
        except CommandError as error:
            faults.append(error)
        finally:
            remove(folder)
            free_memory()
    raise faults[0]


def open_search(folder: Path, space: Sequence[Dimension], options: Options, facts: Mapping[str, Any]) -> Search:
    return Search(
        folder,
        space,
        lower_is_better=options.metric in LOWER_IS_BETTER,
        prune=options.prune,
        seed=options.sampler_seed,
        facts=facts,
    )


def make_all(search: Search, trials: Trials, options: Options, write: Callable[[], None]) -> None:
    """Make the trials that are left, here or in processes of their own; `write` writes what is over."""
    steps = trials.plan.tasks * options.seeds
    best = next(iter(search.ranking()), None)
    progress = Progress(
        options.metric, options.trials, len(search.rows()), steps, options.metric in LOWER_IS_BETTER, best
    )

    def over(row: Row) -> None:
        progress.trial(row)
        write()

    no_bars()  # those of a trial would be drawn over that of the search
    runner = Runner(search, options.metric, options.trials, progress.task, over)
    try:
        if options.jobs == 1:
            runner.here(trials)
        else:
            around = surroundings(options.jobs, os.environ, os.cpu_count() or 1, torch.cuda.device_count())
            runner.in_processes(partial(trials_of_a_worker, trials.config, trials.plan, tuple(IMPORTED)), around)
    finally:
        progress.close()


def trials_of_a_worker(config: Mapping[str, Any], plan: Plan, imported: Sequence[str] = ()) -> Trials:
    """What makes trials in a process of their own, with the user's code; what it would warn of is said by the first
    process, which has put a trainer together too."""
    import_all(imported)
    no_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    return Trials(config, plan)


def facts_of(
    config: Mapping[str, Any], space: Sequence[Dimension], trials: Trials, options: Options
) -> dict[str, Any]:
    """What makes a search what it is, in types that JSON knows."""
    training = {name: value for name, value in (config.get("training") or {}).items() if name != "hub_token"}
    data = {**trials.scenario.describe(), "num_tasks": len(trials.whole), "images": trials.scenario.content}
    facts = {
        **options.kept(),
        "tasks": trials.plan.tasks,
        "search": {each.name: each.facts() for each in space},
        "config": {**{name: value for name, value in config.items() if name != "output_dir"}, "training": training},
        "data": data,
    }
    return json.loads(json.dumps(facts, default=str))


def refuse_another(kept: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse to go on with a search that was another one."""
    if not kept:
        return
    found = differences({**kept, "trials": 0}, {**facts, "trials": 0})
    if found:
        raise CommandError(
            f"--resume does not work: the search in the output folder was another one ({'; '.join(found[:5])}"
            f"{'; ...' if len(found) > 5 else ''}). Give the same again, or another output_dir."
        )


def clear(folder: Path) -> None:
    """Remove what an earlier search wrote; a run of its best configuration stays."""
    if (folder / FILE).exists():
        for name in (FILE, f"{FILE}.lock", CSV_FILE, JSON_FILE, BEST_FILE, GIVEN_FILE, TRIALS_FOLDER):
            remove(folder / name)


# ----------------------------------------------------------------------------------------------- what is said


def describe(space: Sequence[Dimension], trials: Trials, options: Options, folder: Path) -> str:
    """Say what is searched, and what by."""
    first, plan = trials.scenario, trials.plan
    images = sum(len(task.test) for task in first)
    better = "lower" if options.metric in LOWER_IS_BETTER else "higher"
    width = max(len(each.name) for each in space)
    lines = {
        "search": f"{counted(options.trials, 'trial')}, drawn with seed {options.sampler_seed}"
        + (", given up between tasks worse than the median" if options.prune else ""),
        "learnt": f"the first {len(first)} of {counted(len(trials.whole), 'task')}, "
        f"{counted(sum(len(task.train) for task in first), 'image')}, training "
        f"{'seeds' if options.seeds > 1 else 'seed'} {', '.join(map(str, plan.seeds))}",
        "judged by": f"{options.metric} ({better} is better) on {counted(images, 'held-out training image')}, "
        f"{options.holdout:g} of each class, drawn with seed {options.holdout_seed}; no test image is read",
        "output": str(folder),
    }
    tried = [f"  {each.name:<{width}}  {each}" for each in space]
    return "\n".join([*(f"{name + ':':<11}{text}" for name, text in lines.items()), "tried:", *tried, ""])


def finish(folder: Path, search: Search, config: Mapping[str, Any], options: Options, command: str) -> str:
    """Write the best configuration, and return the summary.

    Raises:
        CommandError: No trial was finished.
    """
    ranking, rows = search.ranking(), search.rows()
    if not ranking:
        reason = next((row.reason for row in rows if row.reason), "all were given up")
        raise CommandError(
            f"None of {counted(len(rows), 'trial')} was finished. Correct what stopped them; trial {rows[0].number}: "
            f"{reason}"
        )
    best = ranking[0]
    figure = f"{options.metric.replace('_', ' ')} {percent(best.value, 2)}{_error(folder, best, options)}%"
    write_best(folder, best, config, figure, command)
    shares = [f"{name} {percent(share, 0)}%" for name, share in search.importance().items()]
    return "\n".join(
        [
            "",
            best_table(ranking, options.metric),
            "",
            f"{counted(len(rows), 'trial')}: {counted_states(rows)}.",
            f"The best is trial {best.number}: {figure} on held-out images. It is the best of several, so "
            "expect less on other images.",
            *([f"What sets the best trials apart: {', '.join(shares)}."] if shares else []),
            f"All trials are in {folder / CSV_FILE} and {folder / JSON_FILE}.",
            "",
            "Next:",
            f"  {shlex.join(['peft-cl', 'train', str(folder / BEST_FILE)])}    # the best settings, with all tasks, "
            "all training images, and the test images",
        ]
    )


def _error(folder: Path, best: Row, options: Options) -> str:
    """What the held-out images leave open of the average accuracy of one run."""
    if options.metric != "average_accuracy" or options.seeds > 1:
        return ""
    records = (folder / TRIALS_FOLDER / f"{best.number:04d}").glob(f"seed_*/{RESULTS_FILE}")
    error = next((standard_error(RunResults.load(record.parent)) for record in records), None)
    return "" if error is None else f" ± {percent(error, 2)}"


def write_best(folder: Path, best: Row, config: Mapping[str, Any], figure: str, command: str) -> None:
    """Write the configuration with the best settings, for `peft-cl train`."""
    changed = with_settings(config, best.settings)
    output = str(local_path(changed["output_dir"]) / BEST_FOLDER)
    changed = {**{name: value for name, value in changed.items() if name != "output_dir"}, "output_dir": output}
    if isinstance(changed.get("training"), dict):
        changed["training"] = {name: value for name, value in changed["training"].items() if name != "hub_token"}
    text = write_yaml(changed)
    head = f"# Trial {best.number} of a search: {figure} on held-out training images of the first tasks.\n"
    with replacing(folder / BEST_FILE) as aside:
        aside.write_text(f"{head}#   {plain(command, None)}\n{text}", encoding="utf-8")
