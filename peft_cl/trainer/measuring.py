"""Measuring: which test images, and what is made of the predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from ..metrics.predictions import evaluation_details
from ..scenarios import Task
from .earlier import EarlierTasks
from .examples import TaskExamples, row_counts
from .predictions import NamedPredictions
from .restarting import RestartingTrainer


class MeasuringTrainer(RestartingTrainer):
    """A trainer that measures the tasks seen, those of earlier runs included where there are test images of them.

    Attributes:
        earlier: the tasks that the adapter had learnt before this run; set before `__init__`.
    """

    earlier: EarlierTasks
    #: For each task of the scenario one whose test images are those to choose by within a task; empty without such.
    validation: list[Task]
    #: The scenario's tasks as they were given, before they got their names on record.
    _given: list[Task]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, compute_metrics=self._accuracies, **kwargs)
        self._measured: list[Task] = []

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ):
        """Measure accuracy, by default on the test examples of each task seen, which fills a row of the matrix. Within
        a task it is of the validation images, where there are such, and fills nothing.

        Args:
            eval_dataset: a `Task`, for its test examples; other examples of the scenario's classes; None: the tasks
                seen.

        Returns:
            dict with `eval_loss`, `eval_average_accuracy` (mean over tasks) and `eval_accuracy_<task name>`; for other
            examples `eval_loss` and `eval_accuracy`.
        """
        if eval_dataset is None:
            self._measured = self._to_measure()
            self.selected_rows = []
            eval_dataset = self.examples(self._measured, "test")
        else:
            eval_dataset = self._own_examples(eval_dataset)
        try:
            with self.uncounted(), nullcontext() if self.began is None else self.head_as_if_finished():
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if self.selected_rows and not self._validates:
                sizes = [len(task.test) for task in self._measured]
                rows = self.key_sets * self.tuner.pool.rows_in_use
                self.prompt_usage = row_counts(self.selected_rows, sizes, rows)
        finally:
            measured, self._measured, self.selected_rows = self._measured, [], None
        self._note(measured, metrics, metric_key_prefix)
        return metrics

    def _to_measure(self) -> list[Task]:
        """The tasks seen that there are test images of; with `measure_ahead` those to come too. Before anything is
        learnt, what a loaded adapter has learnt."""
        if self._validates:
            return self.validation[: self.task.index + 1]
        if self.task is not None:
            ahead = self.args.measure_ahead and self.began is None  # between tasks
            return [*self.earlier.tests, *(self.scenario if ahead else self.scenario[: self.task.index + 1])]
        known = set(self.classes_before)
        found = list(self.earlier.tests) or [task for task in self._given if known.issuperset(task.classes)]
        if not found:
            why = "No task has begun, so there is nothing to measure. Call train() first."
            if self.tasks_before:
                why = (
                    "No task has begun in this run, and there are no test images of the tasks that the adapter has "
                    "learnt before. Give the trainer earlier_test=, or evaluate() a data set."
                )
            raise ValueError(why)
        return found

    @property
    def _validates(self) -> bool:
        """Whether what is measured now is to choose by: within a task, if there are images for it."""
        return self.began is not None and bool(self.validation)

    def _note(self, measured: Sequence[Task], metrics: Mapping[str, float], prefix: str) -> None:
        """Enter accuracies of tasks into the matrix, which is of test images."""
        if self._validates:
            return
        before = self.tasks_before
        for task in measured:
            value = metrics[f"{prefix}_accuracy_{task.name}"]
            if self.task is not None:
                self.whole_matrix[before + self.task.index, before + task.index] = value
            elif task.index < 0 and np.isnan(self.whole_matrix[before - 1, before + task.index]):
                self.whole_matrix[before - 1, before + task.index] = value  # of the adapter as it was loaded

    def _measure_baseline(self) -> None:
        self.evaluate()
        row = self.whole_matrix[self.tasks_before]
        record = self.earlier.record
        known = self.earlier.on_record((record and record.baseline) or [np.nan] * len(self.earlier), np.nan)
        self.baseline, self.whole_matrix[self.tasks_before] = [*known, *row[self.tasks_before :].tolist()], np.nan

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"):
        """The Trainer's `predict`, for what `evaluate` takes as `eval_dataset`, and for images without labels.

        Args:
            test_dataset: a `Task`, other examples of the scenario's classes, or a data set with images alone.

        Returns:
            `NamedPredictions`: `predictions` and `label_ids` are rows of the head, not label ids of the data; `names`
            are the classes predicted, by name.
        """
        examples, collator = self._own_examples(test_dataset), self.data_collator
        if self._is_unlabelled(test_dataset):
            self.data_collator = copy(collator)
            self.data_collator.unlabelled = True
        try:
            output = super().predict(examples, ignore_keys, metric_key_prefix)
        finally:
            self.data_collator = collator
        config = self.tuner.peft_config[self.tuner.active_adapters[0]]
        return NamedPredictions.of(output, config.classes)

    def _is_unlabelled(self, data: Any) -> bool:
        return self.scenario.label_column not in getattr(data, "column_names", [self.scenario.label_column])

    def _own_examples(self, data: Any) -> Any:
        """Examples with the labels that their task gives them, or that their own class names have."""
        if isinstance(data, Task):
            return self.examples([data], "test")
        for task in (*self._given, *self.earlier.tests, *self.scenario):
            for split in ("train", "test"):
                if data is getattr(task, split):
                    return self.examples([task], split, measured=True)
        unlabelled = self._is_unlabelled(data)
        if unlabelled and not self.scenario.task_known:
            return self._read_by_name(data)
        if self.scenario.task_known or any(task.label_names is not None for task in self.scenario):
            why = (
                "The task of a test image is known in this scenario, but that of these examples is not."
                if self.scenario.task_known
                else "The tasks come from data sets that number their classes differently, so what the labels of "
                "these examples mean is not known."
            )
            remedy = " To predict without it, call peft_cl.classify." if unlabelled else ""
            raise ValueError(f"{why} Give a Task, or a task's own train or test data.{remedy}")
        feature = getattr(data, "features", {}).get(self.scenario.label_column)
        names = tuple(feature.names) if isinstance(feature, ClassLabel) else self.scenario.label_names
        if names == self.scenario.label_names:
            return self._read_by_name(data)
        task = Task(0, "given", (), data, data, names)
        if (self.scenario.model_labels(task, "test", self.classes_before) < 0).any():
            raise ValueError(
                f"The examples have labels of {list(names)}, of which the model has {self._classes()}. Remove "
                "examples of other classes by filter()."
            )
        return self.examples([task], "test")

    def _read_by_name(self, data: Any) -> Any:
        """Examples of the user's own, of which an image that cannot be read is named."""
        if not isinstance(data, Dataset):
            return data
        reader = replace(self.reader, remedy="Mend the file or remove it from the data.")
        return TaskExamples([data], {}, reader=reader, names=[(None, "given")])

    def _classes(self) -> list[str]:
        """Names of the model's classes, those to come included."""
        return list(dict.fromkeys([*self.classes_before, *self.scenario.classes]))

    def _accuracies(self, prediction: Any) -> dict[str, float]:
        correct = np.asarray(prediction.predictions) == np.asarray(prediction.label_ids)
        if not self._measured:
            return {"accuracy": float(correct.mean())}
        ends = np.cumsum([len(task.test) for task in self._measured])
        if len(correct) != ends[-1]:
            raise RuntimeError(f"{len(correct)} predictions came back for {ends[-1]} test examples")
        accuracies = [part.mean() for part in np.split(correct, ends[:-1])]
        seen = sum(self.task is None or task.index <= self.task.index for task in self._measured)
        if self.began is None and self.task is not None:
            self.details = self._details(prediction, self._measured[:seen])
        return {
            "average_accuracy": float(np.mean(accuracies[:seen])),
            **{f"accuracy_{task.name}": float(value) for task, value in zip(self._measured, accuracies, strict=True)},
        }

    def _details(self, prediction: Any, seen: Sequence[Task]) -> dict[str, Any]:
        """What is told by predictions for the tasks seen, beside their accuracies."""
        sizes = np.array([len(task.test) for task in seen])
        # Of some tasks alone it would look better than it is.
        whole = sum(task.index < 0 for task in seen) == len(self.earlier)
        asked = whole and self.scenario.boundaries and not self.scenario.task_known
        disjoint = sum(len(task.classes) for task in seen) == len({name for task in seen for name in task.classes})
        details = evaluation_details(
            np.asarray(prediction.predictions)[: sizes.sum()],
            np.asarray(prediction.label_ids)[: sizes.sum()],
            np.repeat(np.arange(len(sizes)), sizes),
            self._classes(),
            [task.classes for task in seen] if asked and disjoint else None,
        )
        return {**details, "without_prompts": self.without_prompts.measure(self, seen) if whole else None}
