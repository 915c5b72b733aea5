"""Measuring: which test images, and what is made of the predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset

from ..metrics.predictions import evaluation_details
from ..scenarios import Task
from .earlier import EarlierTasks
from .examples import TaskExamples, row_counts
from .own_metrics import OwnMetrics, Values, by_task, entries
from .predictions import NamedPredictions
from .restarting import RestartingTrainer


class MeasuringTrainer(RestartingTrainer):
    """A trainer that measures the tasks seen, those of earlier runs included where there are test images of them.

    Attributes:
        earlier: the tasks that the adapter had learnt before this run; set before `__init__`.
        own_metrics: the user's own metrics; set before `__init__`.
    """

    earlier: EarlierTasks
    own_metrics: OwnMetrics
    #: For each task of the scenario one whose test images are those to choose by within a task; empty without such.
    validation: list[Task]
    #: The scenario's tasks as they were given, before they got their names on record.
    _given: list[Task]

    def __init__(self, *args: Any, **kwargs: Any):
        measures = {"compute_metrics": self._accuracies, "preprocess_logits_for_metrics": self._kept_of}
        super().__init__(*args, **measures, **kwargs)
        self._measured: list[Task] = []
        #: Values of own metrics that are no numbers, of the measurement under way: they are not logged.
        self._lists: Values = {}

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
            examples `eval_loss` and `eval_accuracy`. With own metrics also `eval_<name>`, for numbers the mean over
            tasks, and `eval_<name>_<task name>`.
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
        return metrics | self._taken_lists(metric_key_prefix)

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
        if isinstance(output.predictions, tuple):  # own metrics had scores beside the rows
            lists = self._taken_lists(metric_key_prefix)
            output = output._replace(predictions=output.predictions[0], metrics=output.metrics | lists)
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

    def _kept_of(self, logits: torch.Tensor, labels: torch.Tensor | None) -> Any:
        """What is kept of a batch: the rows predicted; the scores too where own metrics are computed from them."""
        rows = logits.argmax(dim=-1)
        return (rows, logits.float()) if self.own_metrics and labels is not None else rows

    def _accuracies(self, prediction: Any) -> dict[str, float]:
        rows, scores = prediction.predictions if self.own_metrics else (prediction.predictions, None)
        rows, labels = np.asarray(rows), np.asarray(prediction.label_ids)
        correct = rows == labels
        if not self._measured:
            return {"accuracy": float(correct.mean()), **self._logged(*self._own(scores, labels, []))}
        ends = np.cumsum([len(task.test) for task in self._measured])
        if len(correct) != ends[-1]:
            raise RuntimeError(f"{len(correct)} predictions came back for {ends[-1]} test examples")
        accuracies = [part.mean() for part in np.split(correct, ends[:-1])]
        seen = sum(self.task is None or task.index <= self.task.index for task in self._measured)
        own, names = self._own(scores, labels, ends[:-1]), [task.name for task in self._measured]
        if self.began is None and self.task is not None:
            self.details = self._details(rows, labels, self._measured[:seen])
            if own:
                places = [len(self.earlier) + task.index for task in self._measured[:seen]]
                self.details["own_metrics"] = by_task(own[:seen], places, self.tasks_before + self.task.index + 1)
        return {
            "average_accuracy": float(np.mean(accuracies[:seen])),
            **{f"accuracy_{name}": float(value) for name, value in zip(names, accuracies, strict=True)},
            **self._logged(entries(own, names, seen)),
        }

    def _own(self, scores: np.ndarray | None, labels: np.ndarray, ends: Sequence[int]) -> list[Values]:
        """Own metrics of each task that is measured, or of examples that are none; empty without such metrics."""
        if scores is None:
            return []
        names = [f"the images of {task.name}" for task in self._measured] or ["the examples given"]
        parts = zip(np.split(scores, ends), np.split(labels, ends), names, strict=True)
        return [self.own_metrics.measure(*part) for part in parts]

    def _logged(self, own: Values | None = None) -> dict[str, float]:
        """The numbers among the values; lists are kept, for `_taken_lists`."""
        self._lists = {name: value for name, value in (own or {}).items() if isinstance(value, list)}
        return {name: value for name, value in (own or {}).items() if name not in self._lists}

    def _taken_lists(self, prefix: str) -> Values:
        """The lists of the last measurement, by their names in what it returns; once."""
        lists, self._lists = self._lists, {}
        return {f"{prefix}_{name}": value for name, value in lists.items()}

    def _details(self, rows: np.ndarray, labels: np.ndarray, seen: Sequence[Task]) -> dict[str, Any]:
        """What is told by predictions for the tasks seen, beside their accuracies."""
        sizes = np.array([len(task.test) for task in seen])
        # Of some tasks alone it would look better than it is.
        whole = sum(task.index < 0 for task in seen) == len(self.earlier)
        asked = whole and self.scenario.boundaries and not self.scenario.task_known
        disjoint = sum(len(task.classes) for task in seen) == len({name for task in seen for name in task.classes})
        details = evaluation_details(
            rows[: sizes.sum()],
            labels[: sizes.sum()],
            np.repeat(np.arange(len(sizes)), sizes),
            self._classes(),
            [task.classes for task in seen] if asked and disjoint else None,
        )
        return {**details, "without_prompts": self.without_prompts.measure(self, seen) if whole else None}
