"""The record of one run (`results.json`), and the table that compares runs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from .usage import checked_counts


FORMAT_VERSION = 1
FILE_NAME = "results.json"
# Fields younger than files that exist: those lack them. Where one is None new files lack it too, for older readers.
ADDED_LATER = {"prompt_usage"}

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
    """Returns the runs as a GitHub table, one line per method, in the order of their first run.

    Several seeds of one method become mean ± sample standard deviation (n - 1) with their number; runs that are not
    finished stand in lines of their own, with the tasks done. Accuracy and forgetting come from each run's `metrics`;
    "–" where it has none.

    Raises:
        ValueError: No runs, runs of different data sets, backbones or scenarios (they do not compare), or the same
            method and seed twice.

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
    groups: dict[tuple[str, int], list[RunResults]] = {}
    for run in results:
        group = groups.setdefault((run.method, run.finished_tasks), [])
        if any(other.seed == run.seed for other in group):
            raise ValueError(
                f"There are two runs of {run.method!r} with the seed {run.seed}; give variants of a method different "
                "names, or leave one out."
            )
        group.append(run)
    header = f"| {' | '.join(TABLE_COLUMNS)} |\n|---|{'---:|' * (len(TABLE_COLUMNS) - 1)}"
    return "\n".join([header, *(_row(group) for group in groups.values())])


def _row(runs: list[RunResults]) -> str:
    first = runs[0]
    method = first.method.replace("|", "\\|")
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
