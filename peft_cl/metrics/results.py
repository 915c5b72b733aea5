"""The record of one run (`results.json`)."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..disk import check_file, replacing
from ..text import brief
from .matrix import intransigence
from .own import own_values
from .record_checks import check_calibrations, check_record
from .usage import checked_counts, usage_entropy, usage_overlap


FORMAT_VERSION = 1
FILE_NAME = "results.json"
# Fields younger than files that exist: those lack them. Where one is None new files lack it too, for older readers.
ADDED_LATER = {
    "prompt_usage",
    "baseline",
    "task_identification",
    "per_class_accuracy",
    "sums_bytes",
    "query_seconds",
    "learnt",
    "without_prompts",
    "own_metrics",
    "backbone",
    "kept_bytes",
    "peak_memory_bytes",
    "flops",
    "calibration",
}
# What runs must have in common for the tasks of one to be those of the other.
SAME_TASKS = ("dataset", "task_names", "test_sizes")


@dataclass
class RunResults:
    """What a run was and what it measured; saved as `results.json` next to the adapter.

    In memory an accuracy or metric that was not measured is NaN, in the file it is `null`.

    Attributes:
        method: Name in tables, for example `"CODA-Prompt"`.
        peft_type: PEFT type of the adapter, `None` if the method has none (fine-tuning).
        base_model: Name or path of the backbone.
        dataset: Name or path of the data set.
        scenario: `Scenario.describe()`, and `content`, a digest of the images.
        seed: Seed of the run.
        task_names: Names of the tasks, in order.
        accuracy_matrix: `R[i][j]`, accuracy (0 to 1) on task j after task i; an array is taken too.
        test_sizes: Number of test examples of each task.
        metrics: `continual_metrics` of the matrix, fractions of 1.
        trainable_parameters: Number of parameters that were trained.
        total_parameters: Number of all parameters, frozen ones included.
        adapter_bytes: Size of the saved adapter in bytes, `None` if none was saved.
        train_seconds: Time of training, without the evaluations and without `query_seconds`, in seconds.
        hyperparameters: Settings of the run, in types that JSON knows.
        versions: Versions of the libraries, by name.
        command: Command line that started the run, `None` if it was started from Python.
        finished_tasks: Number of tasks trained and evaluated; fewer than `task_names` while the run is under way.
        prompt_usage: `counts[j][r]`, how often row r of the pool was chosen for test images of task j after the last
            finished task; a list for each finished task, an array is taken too. Where each layer has keys of its own,
            the rows of the first layer's come first. `None` where all rows take part in every image, or nothing was
            counted.
        baseline: Accuracy on each task before the first one was learnt, `None` if it was not measured
            (`measure_ahead`).
        task_identification: Share of the test images, after the last finished task, whose predicted class is one of
            their own task's; `None` where tasks share classes, or where the task of an image is known.
        per_class_accuracy: Accuracy on each class that has test images, by its name, after the last finished task.
        sums_bytes: Size of the file with the sums of a head that is computed from them, which learning on and joining
            need and predicting does not; `None` if the head has none.
        query_seconds: Time of the frozen model's pass over training images whose queries are kept, in seconds; `None`
            in records of earlier versions, whose `train_seconds` hold it.
        learnt: For each finished task what it took: `epochs`, `steps` of the optimizer and `images_per_step`, each
            `None` where it is not known; `None` in records of earlier versions.
        without_prompts: What the frozen model's features give on the same tasks after the last finished one, where
            they are at hand: the name of the `head` on them, and `accuracies`, one for each task; `None` where not.
        own_metrics: What metrics of the user's own (`compute_metrics`) gave after the last finished task: by name a
            value for each finished task, a number or lists of numbers, NaN where it was not measured. `None` without
            such metrics.
        backbone: Of the backbone the number of `parameters`, how many of them are `trained`, and `saved_bytes`: what
            it takes of `adapter_bytes` because it is saved with the adapter; `None` in records of earlier versions.
        kept_bytes: Bytes that must be kept to learn the next task and that predicting does not need, by what they are
            (`"memory"`: the images of a comparison method's memory as the model reads them); `None` in records of
            earlier versions.
        peak_memory_bytes: Memory in use at the peak of the first process: tensors on its GPU, or the process on a CPU.
        flops: Floating-point operations of learning on all processes, if they were counted (`count_flops`).
        calibration: For each finished task the temperature that was fitted after it on held-out images of the tasks so
            far (`fit_temperature`), with measures before and after, as `peft_cl.reliability.Calibration.to_dict` gives
            them; `None` for a task without, and in the place of all where none was fitted.

    A setting in `hyperparameters` that was another in some of the tasks is a list there, one value for each finished
    task. An adapter that learnt on in a later run has one record for all of its tasks.

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
    baseline: list[float] | None = None
    task_identification: float | None = None
    per_class_accuracy: dict[str, float] | None = None
    sums_bytes: int | None = None
    query_seconds: float | None = None
    learnt: list[dict[str, Any]] | None = None
    without_prompts: dict[str, Any] | None = None
    own_metrics: dict[str, list] | None = None
    backbone: dict[str, int] | None = None
    kept_bytes: dict[str, int] | None = None
    peak_memory_bytes: int | None = None
    flops: int | None = None
    calibration: list[dict[str, Any] | None] | None = None

    def __post_init__(self) -> None:
        self.accuracy_matrix = [[_number(value) for value in row] for row in self.accuracy_matrix]
        self.metrics = {name: _number(value) for name, value in self.metrics.items()}
        if self.baseline is not None:
            self.baseline = [_number(value) for value in self.baseline]
        tasks = len(self.task_names)
        if len(self.accuracy_matrix) != tasks or any(len(row) != tasks for row in self.accuracy_matrix):
            lengths = [len(row) for row in self.accuracy_matrix]
            raise ValueError(
                f"accuracy_matrix has {len(lengths)} rows of the lengths {brief(lengths)}, but {tasks} tasks need "
                f"{tasks} rows of {tasks}; fill what was not measured with NaN."
            )
        if len(self.test_sizes) != tasks or not 0 <= self.finished_tasks <= tasks:
            raise ValueError(
                f"test_sizes has {len(self.test_sizes)} entries and finished_tasks is {self.finished_tasks}, but "
                f"there are {tasks} tasks; give one size per task, and at most {tasks} finished tasks."
            )
        if self.baseline is not None and len(self.baseline) != tasks:
            raise ValueError(
                f"baseline has {len(self.baseline)} entries, but there are {tasks} tasks; give an accuracy for each, "
                "or None."
            )
        if self.prompt_usage is not None:
            self.prompt_usage = checked_counts(self.prompt_usage).tolist()
            if len(self.prompt_usage) != self.finished_tasks:
                raise ValueError(
                    f"prompt_usage has {len(self.prompt_usage)} entries, but finished_tasks is {self.finished_tasks}; "
                    "give the counts of each finished task, or None."
                )
        if self.own_metrics is not None:
            self.own_metrics = own_values(self.own_metrics, self.finished_tasks)
        if self.calibration is not None:
            check_calibrations(self.calibration, self.finished_tasks)

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
        text = json.dumps(to_json(record), indent=2, allow_nan=False) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside, open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
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
        check_file(path)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8, or brackets in brackets
            raise ValueError(
                f"{path} is damaged, it is not readable as JSON ({error}); restore it, or run again."
            ) from error
        if not isinstance(record, dict) or "format_version" not in record:
            raise ValueError(f"{path} is not the record of a run: it has no format_version; give a {FILE_NAME}.")
        version = record.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has the format version {brief(version)}, this version of peft-cl reads {FORMAT_VERSION}; "
                "update peft-cl, or read it with the version that wrote it."
            )
        known = {f.name: f for f in dataclasses.fields(cls)}
        missing, unknown = (
            [name for name in known if name not in record and name not in ADDED_LATER],
            [name for name in record if name not in known],
        )
        if missing or unknown:
            raise ValueError(
                f"{path} is damaged: missing fields {missing}, unknown fields {brief(unknown)}; restore it, or run "
                "again."
            )
        try:
            results = cls(**record)
            check_record(results)
            return results
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path} is damaged: {error} Restore it, or run again.") from error

    def intransigence(self, reference: RunResults) -> float:
        """Returns the metric `intransigence`, of the finished tasks, against a run that kept all data.

        Args:
            reference: The record of such a run (`JointTraining`) on the same tasks; what it reached on each of them
                when it had just learnt it counts.

        Raises:
            ValueError: The reference learnt other tasks, or fewer of them.
        """
        mine, others = (
            {name: getattr(run, name) for name in SAME_TASKS} | {"class_order": run.scenario.get("class_order")}
            for run in (self, reference)
        )
        contents = [run.scenario.get("content") for run in (self, reference)]
        if None not in contents:  # earlier records do not say
            mine["content"], others["content"] = contents
        different = [name for name, value in mine.items() if others[name] != value]
        if different:
            raise ValueError(
                f"The reference differs from the run in {', '.join(different)}, so its accuracies are of other tasks; "
                "train it on the same scenario with the same seed."
            )
        if reference.finished_tasks < self.finished_tasks:
            raise ValueError(
                f"The reference has finished {reference.finished_tasks} tasks, the run {self.finished_tasks}; let the "
                "reference finish as many."
            )
        reached = np.array(reference.accuracy_matrix).diagonal()
        return intransigence(self.accuracy_matrix, reached)

    def usage_metrics(self) -> dict[str, float]:
        """Returns how evenly, and how much in common, tasks use the rows of the pool; nothing without `prompt_usage`.

        Returns:
            `usage_entropy`, the mean over the tasks in bits, and `usage_overlap`, the mean over each two tasks, of the
            functions of that name, which tell it task by task; without the latter for a single task.
        """
        if self.prompt_usage is None:
            return {}
        overlap = usage_overlap(self.prompt_usage)
        others = overlap[~np.eye(len(overlap), dtype=bool)]
        found = {"usage_entropy": float(usage_entropy(self.prompt_usage).mean())}
        return found | ({"usage_overlap": float(others.mean())} if others.size else {})

    def markdown_row(self) -> str:
        """Returns this run as a line of the table that `results_table` makes."""
        from .table import row_of

        return row_of([self])


def _number(value: float | None) -> float:
    # Always the same NaN object: lists compare by identity first, so a record read back equals the one saved.
    return math.nan if value is None or math.isnan(value) else float(value)


def to_json(value: Any) -> Any:
    """Returns the value in types that JSON knows, NaN as None."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(entry) for entry in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"results.json cannot hold {value!r} ({type(value).__name__}); turn it into text or numbers.")


def _file_of(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path
