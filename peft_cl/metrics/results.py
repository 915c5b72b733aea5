"""The record of one run (`results.json`), and the table that compares runs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from .usage import checked_counts


FORMAT_VERSION = 1
FILE_NAME = "results.json"
# Fields younger than files that exist: those lack them. Where one is None new files lack it too, for older readers.
ADDED_LATER = {"prompt_usage"}
# Settings likewise, with what runs did that do not say.
SETTINGS_ADDED_LATER = {
    "scenario.boundaries": True,
    "hyperparameters.adam_epsilon": 1e-8,
    "hyperparameters.dataloader_drop_last": False,
    "hyperparameters.train_sampling_strategy": "random",
    "hyperparameters.load_best_model_at_end": False,
    "hyperparameters.adapter.task_evidence": 0.0,
}
# Settings, by the last part of their names, that differ between seeds of one run, or say where it ran.
NOT_COMPARED = {"seed", "data_seed", "stream_seed", "device", "threads", "peft_version", "format_version"}

TABLE_COLUMNS = (
    "Method",
    "Final average accuracy (%)",
    "Forgetting (%)",
    "Training time",
    "Trainable parameters",
    "Adapter size",
)


@dataclass
class RunResults:
    """What a run was and what it measured; saved as `results.json` next to the adapter.

    In memory an accuracy or metric that was not measured is NaN, in the file it is `null`.

    Attributes:
        method: Name in tables, for example `"CODA-Prompt"`.
        peft_type: PEFT type of the adapter, `None` if the method has none (fine-tuning).
        base_model: Name or path of the backbone.
        dataset: Name or path of the data set.
        scenario: `Scenario.describe()`.
        seed: Seed of the run.
        task_names: Names of the tasks, in order.
        accuracy_matrix: `R[i][j]`, accuracy (0 to 1) on task j after task i; an array is taken too.
        test_sizes: Number of test examples of each task.
        metrics: `continual_metrics` of the matrix, fractions of 1.
        trainable_parameters: Number of parameters that were trained.
        total_parameters: Number of all parameters, frozen ones included.
        adapter_bytes: Size of the saved adapter in bytes, `None` if none was saved.
        train_seconds: Time of training, without the evaluations, in seconds.
        hyperparameters: Settings of the run, in types that JSON knows.
        versions: Versions of the libraries, by name.
        command: Command line that started the run, `None` if it was started from Python.
        finished_tasks: Number of tasks trained and evaluated; fewer than `task_names` while the run is under way.
        prompt_usage: `counts[j][r]`, how often row r of the pool was chosen for test images of task j after the last
            finished task; a list for each finished task, an array is taken too. Where each layer has keys of its own,
            the rows of the first layer's come first. `None` where all rows take part in every image, or nothing was
            counted.

    Example:
        >>> results.save("out/results.json")
        >>> print(results_table([RunResults.load("out/results.json")]))
    """

    method: str
    peft_type: str | None
    base_model: str
    dataset: str
    scenario: dict[str, Any]
    seed: int
    task_names: list[str]
    accuracy_matrix: list[list[float]]
    test_sizes: list[int]
    metrics: dict[str, float]
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int | None
    train_seconds: float
    finished_tasks: int
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    prompt_usage: list[list[float]] | None = None

    def __post_init__(self) -> None:
        self.accuracy_matrix = [[_number(value) for value in row] for row in self.accuracy_matrix]
        self.metrics = {name: _number(value) for name, value in self.metrics.items()}
        tasks = len(self.task_names)
        if len(self.accuracy_matrix) != tasks or any(len(row) != tasks for row in self.accuracy_matrix):
            lengths = [len(row) for row in self.accuracy_matrix]
            raise ValueError(
                f"accuracy_matrix has {len(lengths)} rows of the lengths {lengths}, but {tasks} tasks need {tasks} "
                f"rows of {tasks}; fill what was not measured with NaN."
            )
        if len(self.test_sizes) != tasks or not 0 <= self.finished_tasks <= tasks:
            raise ValueError(
                f"test_sizes has {len(self.test_sizes)} entries and finished_tasks is {self.finished_tasks}, but "
                f"there are {tasks} tasks; give one size per task, and at most {tasks} finished tasks."
            )
        if self.prompt_usage is not None:
            self.prompt_usage = checked_counts(self.prompt_usage).tolist()
            if len(self.prompt_usage) != self.finished_tasks:
                raise ValueError(
                    f"prompt_usage has {len(self.prompt_usage)} entries, but finished_tasks is {self.finished_tasks}; "
                    "give the counts of each finished task, or None."
                )

    def save(self, path: str | Path) -> Path:
        """Writes the record as JSON and returns the file's path; an older file is replaced at once or not at all.

        Args:
            path: The file, or a folder that exists: `results.json` in it.

        Raises:
            TypeError: A value that JSON does not know (it names the value).
            ValueError: An infinite number; JSON has none.
        """
        path = _file_of(path)
        record = {
            "format_version": FORMAT_VERSION,
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
        }
        record = {name: value for name, value in record.items() if value is not None or name not in ADDED_LATER}
        # Made before the disk is touched; allow_nan=False because NaN is not JSON and other readers refuse it.
        text = json.dumps(_to_json(record), indent=2, allow_nan=False) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(aside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> RunResults:
        """Reads a record that `save` wrote.

        Args:
            path: The file, or a folder with a `results.json`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, is no record of a run, or has a format that this version does not know.
        """
        path = _file_of(path)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(
                f"{path} is damaged, it is not readable as JSON ({error}); restore it, or run again."
            ) from error
        if not isinstance(record, dict) or "format_version" not in record:
            raise ValueError(f"{path} is not the record of a run: it has no format_version; give a {FILE_NAME}.")
        version = record.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has the format version {version!r}, this version of peft-cl reads {FORMAT_VERSION}; "
                "update peft-cl, or read it with the version that wrote it."
            )
        known = {f.name: f for f in dataclasses.fields(cls)}
        missing, unknown = (
            [name for name in known if name not in record and name not in ADDED_LATER],
            [name for name in record if name not in known],
        )
        if missing or unknown:
            raise ValueError(
                f"{path} is damaged: missing fields {missing}, unknown fields {unknown}; restore it, or run again."
            )
        try:
            return cls(**record)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error} Restore it, or run again.") from error

    def markdown_row(self) -> str:
        """Returns this run as a line of the table that `results_table` makes."""
        return _row([self])


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
    return "\n".join([header, *(_row(runs, details[group]) for (group, _), runs in groups.items())])


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
    }
    if scenario.get("seed") is None:  # nothing was drawn: the order was chosen
        facts |= {"task_order": tasks, "class_order": scenario.get("class_order")}
    named = SETTINGS_ADDED_LATER | dict(_by_name(_to_json(facts)))
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


def _row(runs: list[RunResults], details: str = "") -> str:
    first = runs[0]
    method = f"{first.method} ({details})" if details else first.method
    method = method.replace("|", "\\|")
    if first.finished_tasks < len(first.task_names):
        method += f" ({first.finished_tasks} of {len(first.task_names)} tasks)"
    if len(runs) > 1:
        method += f" (n = {len(runs)})"
    sizes = [run.adapter_bytes for run in runs if run.adapter_bytes is not None]
    cells = (
        method,
        _percent([run.metrics.get("average_accuracy", math.nan) for run in runs]),
        _percent([run.metrics.get("forgetting", math.nan) for run in runs]),
        _duration(fmean(run.train_seconds for run in runs)),
        f"{round(fmean(run.trainable_parameters for run in runs)):,}",
        _size(fmean(sizes)) if sizes else "–",
    )
    return f"| {' | '.join(cells)} |"


def _percent(values: list[float]) -> str:
    if any(math.isnan(value) for value in values):
        return "–"
    mean = f"{100 * fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * stdev(values):.2f}"


def _duration(seconds: float) -> str:
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _size(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _number(value: float | None) -> float:
    # Always the same NaN object: lists compare by identity first, so a record read back equals the one saved.
    return math.nan if value is None or math.isnan(value) else float(value)


def _to_json(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {str(key): _to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(entry) for entry in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"results.json cannot hold {value!r} ({type(value).__name__}); turn it into text or numbers.")


def _file_of(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path
