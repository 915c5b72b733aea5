"""The table that compares runs, and what makes runs comparable."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from statistics import fmean, stdev
from typing import Any

from ..text import duration, in_markdown, percent, size
from .results import RunResults, to_json


# Settings younger than files that exist, with what runs did that do not say.
SETTINGS_ADDED_LATER = {
    "scenario.boundaries": True,
    "hyperparameters.adam_epsilon": 1e-8,
    "hyperparameters.dataloader_drop_last": False,
    "hyperparameters.train_sampling_strategy": "random",
    "hyperparameters.load_best_model_at_end": False,
    "hyperparameters.adapter.task_evidence": 0.0,
    "hyperparameters.adapter.head": "linear",
    "hyperparameters.adapter.head_layers": 1,
    "hyperparameters.adapter.train_prompts": "every_task",
}
# Settings, by the last part of their names, that differ between seeds of one run, or say where it ran.
NOT_COMPARED = {
    "seed",
    "data_seed",
    "stream_seed",
    "images_seed",
    "device",
    "threads",
    "peft_version",
    "format_version",
}

TABLE_COLUMNS = (
    "Method",
    "Final average accuracy (%)",
    "Forgetting (%)",
    "Training time",
    "Trainable parameters",
    "Adapter size",
)


def results_table(results: Iterable[RunResults]) -> str:
    """Returns the runs as a GitHub table, one line per method and its settings, in the order of their first run.

    Runs that differ in their seed only become mean ± sample standard deviation (n - 1) with their number. Where a
    method has several settings, its lines say what differs; runs that are not finished stand in lines of their own,
    with the tasks done. Accuracy and forgetting come from each run's `metrics`; "–" where it has none.

    Raises:
        ValueError: No runs, runs of different data sets, backbones or scenarios (they do not compare), or two runs
            with the same method, settings and seed.

    Example:
        >>> print(results_table([RunResults.load(path) for path in sorted(Path("out").glob("*/results.json"))]))
    """
    results = list(results)
    if not results:
        raise ValueError("There are no runs to put in a table; give at least one.")
    settings = {(r.dataset, r.base_model, r.scenario.get("name"), len(r.task_names)) for r in results}
    if len(settings) > 1:
        listed = "; ".join(str(setting) for setting in sorted(settings, key=str))
        raise ValueError(
            f"These runs do not compare, they differ in (data set, backbone, scenario, number of tasks): {listed}. "
            "Make one table for each."
        )
    contents = {r.scenario["content"] for r in results if r.scenario.get("content")}  # earlier records do not say
    if len(contents) > 1:
        raise ValueError(
            f"These runs do not compare, their data is called {results[0].dataset!r} in all of them, but has other "
            f"images (digests {', '.join(sorted(contents))}). Make one table for each."
        )
    groups: dict[tuple[Group, int], list[RunResults]] = {}
    for run in results:
        group = groups.setdefault((group_of(run), run.finished_tasks), [])
        if any(other.seed == run.seed for other in group):
            raise ValueError(
                f"There are two runs of {run.method!r} with the same settings and the seed {run.seed}; leave one out, "
                "or give them different names."
            )
        group.append(run)
    methods = {group: runs[0].method for (group, _), runs in groups.items()}
    details = dict(zip(methods, differences(list(methods.values()), list(methods)), strict=True))
    header = f"| {' | '.join(TABLE_COLUMNS)} |\n|---|{'---:|' * (len(TABLE_COLUMNS) - 1)}"
    return "\n".join([header, *(row_of(runs, details[group]) for (group, _), runs in groups.items())])


#: What runs have in common that differ in their seed only: (name, value) of all that is compared, by name.
Group = tuple[tuple[str, Any], ...]


def group_of(run: RunResults) -> Group:
    """Returns what a run was, but for its seed and where it ran: runs with equal groups differ in their seed only.

    Compared are method, data set, backbone, scenario and hyperparameters. An order of classes or tasks that the
    scenario's seed drew counts as part of that seed: then tasks are compared by name, and numbers of examples in sum.
    """
    scenario, tasks = run.scenario, run.task_names
    classes = zip_longest(tasks, scenario.get("classes_per_task") or (), fillvalue="")
    facts = {
        "method": run.method,
        "dataset": run.dataset,
        "base_model": run.base_model,
        "scenario": {name: scenario[name] for name in ("name", "boundaries", "settings") if name in scenario},
        "tasks": ", ".join(sorted(f"{name} {count}".strip() for name, count in classes)),
        "train_examples": sum(scenario.get("train_sizes", ())),
        "test_examples": sum(run.test_sizes),
        "hyperparameters": run.hyperparameters,
        "content": scenario.get("content"),
    }
    if scenario.get("seed") is None:  # nothing was drawn: the order was chosen
        facts |= {"task_order": tasks, "class_order": scenario.get("class_order")}
    named = SETTINGS_ADDED_LATER | dict(_by_name(to_json(facts)))
    return tuple(sorted((name, value) for name, value in named.items() if name.split(".")[-1] not in NOT_COMPARED))


def _by_name(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _by_name(entry, f"{name}.{key}".lstrip("."))
    elif value is not None:  # a setting that is not set may as well be left out
        yield name, json.dumps(value) if isinstance(value, list) else value


def differences(labels: Sequence[Hashable], groups: Sequence[Group]) -> list[str]:
    """Returns for each group what tells it from the others of the same label, briefly; "" where there are none."""
    found = [""] * len(labels)
    for label in dict.fromkeys(labels):
        places = [place for place, other in enumerate(labels) if other == label]
        if len(places) > 1:
            for place, text in zip(places, _tell_apart([dict(groups[place]) for place in places]), strict=True):
                found[place] = text
    return found


def _tell_apart(groups: list[dict[str, Any]]) -> list[str]:
    names = [name for name in dict.fromkeys(chain(*groups)) if len({group.get(name) for group in groups}) > 1]
    shown: list[str] = []
    for name in names:  # two of them, and more only where they are needed
        if len(shown) < 2 or _count(groups, [*shown, name]) > _count(groups, shown):
            shown.append(name)
    more = ["…"] if len(shown) < len(names) else []
    texts = [", ".join([_setting(name, group.get(name)) for name in shown] + more) for group in groups]
    # Long values are cut, so that they may read the same.
    return [text if texts.count(text) == 1 else f"{text} #{place}" for place, text in enumerate(texts, start=1)]


def _count(groups: list[dict[str, Any]], names: list[str]) -> int:
    return len({tuple(group.get(name) for name in names) for group in groups})


def _setting(name: str, value: Any) -> str:
    short = re.sub(r"^((hyperparameters|adapter|strategy|data|scenario|settings)\.)+", "", name)
    text = str(value)
    return f"no {short}" if value is None else f"{short} {text if len(text) <= 30 else f'{text[:10]}…{text[-19:]}'}"


def row_of(runs: list[RunResults], details: str = "") -> str:
    """Returns the line of runs that differ in their seed only."""
    first = runs[0]
    method = in_markdown(first.method)
    if details:
        method += f" ({in_markdown(details, 300)})"
    if first.finished_tasks < len(first.task_names):
        method += f" ({first.finished_tasks} of {len(first.task_names)} tasks)"
    if len(runs) > 1:
        method += f" (n = {len(runs)})"
    cells = (
        method,
        _percent([run.metrics.get("average_accuracy", math.nan) for run in runs]),
        _percent([run.metrics.get("forgetting", math.nan) for run in runs]),
        duration(fmean(run.train_seconds + (run.query_seconds or 0.0) for run in runs)),
        f"{round(fmean(run.trainable_parameters for run in runs)):,}",
        _sizes(runs),
    )
    return f"| {' | '.join(cells)} |"


def _percent(values: list[float]) -> str:
    if any(math.isnan(value) for value in values):
        return "–"
    mean = percent(fmean(values), 2)
    return mean if len(values) == 1 else f"{mean} ± {percent(stdev(values), 2)}"


def _sizes(runs: list[RunResults]) -> str:
    """Of the adapter, and of what learning on needs beside it: sums, images of a memory, Fisher information, ..."""
    sizes = [run.adapter_bytes for run in runs if run.adapter_bytes is not None]
    kept: dict[str, list[int]] = {}
    for run in runs:
        own = {"sums": run.sums_bytes} if run.sums_bytes is not None else {}
        for name, count in {**own, **(run.kept_bytes or {})}.items():
            kept.setdefault(name, []).append(count)
    adapter = size(fmean(sizes)) if sizes else "–"
    return " + ".join([adapter, *(f"{size(fmean(counts))} of {in_markdown(name)}" for name, counts in kept.items())])
