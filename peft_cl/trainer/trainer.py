"""The trainer of a task sequence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel
from peft import PeftModel
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..hub.card import write_model_card
from ..metrics import RunResults, continual_metrics
from ..metrics.predictions import evaluation_details
from ..metrics.results import FILE_NAME
from ..plots.run import write_pictures
from ..scenarios import Scenario, Task
from .arguments import ContinualTrainingArguments
from .checks import check_callbacks, check_fit, check_functions, check_optimizer, check_replacements
from .examples import row_counts
from .files import check_writable, explained_writes, written_aside
from .loss import check_loss
from .record import adapter_folder, record_of
from .resuming import ResumableTrainer
from .strategy import Combined, Strategy


logger = logging.get_logger(__name__)


class ContinualTrainer(ResumableTrainer):
    """A `transformers.Trainer` that learns the tasks of a scenario one after the other and measures as it goes.

    For each task the model's head and pool start the task, optimizer and schedule are new, and the arguments hold as
    for a training of its own. After it, all tasks seen are evaluated, and adapter and results are saved. A stream
    without boundaries (`task_free`) is learnt in its own order by one optimizer, and measured as often.

    Args:
        model: a `PeftModel` with one of this library's configurations.
        args: `ContinualTrainingArguments`; epochs and steps count per task.
        scenario: the tasks.
        processing_class: the backbone's HF image processor.
        augmentation: applied to each training image (PIL in, PIL out), for instance `RandomResizedCropFlip(size=224)`.
        batch_augmentation: applied to each training batch on its device, normalised pixels (B, C, H, W) in and out:
            a module of kornia or of torchvision's `transforms.v2`, for instance.
        loss: what stands in the place of the cross-entropy: a function of `logits` (B, k), float32, of the k classes
            that the loss is over alone (those of the task, with `train_mask`), of `labels` (B,), which count from 0
            among them, and of `class_names`, their k names. It returns the mean over the batch, or (B,). What the
            method adds (the pull of keys, orthogonality, ...) is added to it as ever. Weighted, focal and smoothed
            losses are one line each: see the example.
        strategy: a comparison method, or a list of them; None trains the adapter as it is.
        **kwargs: further arguments of `transformers.Trainer` (callbacks, ...).

    Attributes:
        accuracy_matrix: (tasks, tasks) array, R[i, j] = accuracy (0 to 1) on task j after task i; NaN if not measured.
        metrics: average and overall accuracy, average incremental accuracy, forgetting, backward transfer, ..., as
            `continual_metrics` names them (fractions).
        results: the record of the run, as saved in `results.json`.

    Raises:
        ValueError: anything that cannot work, before training starts.

    Example:
        >>> trainer = ContinualTrainer(model, args, scenario, processing_class=processor)    # doctest: +SKIP
        >>> trainer.train()                                                                  # doctest: +SKIP
        >>> trainer.metrics["average_accuracy"]                                              # doctest: +SKIP
        >>> trainer.train_task(load_dataset("user/snakes"), name="snakes")  # weeks later    # doctest: +SKIP
        >>> def weighted(logits, labels, class_names):  # a rare class counts five times
        ...     weight = torch.tensor([5.0 if name == "snake" else 1.0 for name in class_names])
        ...     return torch.nn.functional.cross_entropy(logits, labels, weight.to(logits.device))
    """

    def __init__(
        self,
        model: PeftModel,
        args: ContinualTrainingArguments,
        scenario: Scenario,
        *,
        processing_class: Any,
        augmentation: Callable | None = None,
        batch_augmentation: Callable | None = None,
        loss: Callable | None = None,
        strategy: Strategy | Sequence[Strategy] | None = None,
        **kwargs: Any,
    ):
        strategy = Combined(strategy if isinstance(strategy, (list, tuple)) else [strategy or Strategy()])
        check_fit(model, args, scenario, strategy)
        check_functions(processing_class, augmentation, batch_augmentation, args.augmentation_draws)
        check_loss(loss, scenario, model.peft_config[model.active_adapter])
        check_callbacks(args, kwargs.get("callbacks"))
        check_optimizer(args)
        check_replacements(kwargs)
        if args.process_index == 0:
            check_writable(Path(args.output_dir), model.peft_config)
        strategy.prepare(model)
        super().__init__(
            model,
            args,
            scenario,
            processing_class,
            augmentation,
            batch_augmentation,
            loss,
            strategy,
            compute_metrics=self._accuracies,
            **kwargs,
        )
        self._measured: list[Task] = []

    # ----------------------------------------------------------------------------------------------- the sequence

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs: Any) -> TrainOutput | None:
        """Learn all tasks of the scenario. Returns the last task's `TrainOutput` (None if nothing was trained).

        Args:
            resume_from_checkpoint: True, or the folder of an interrupted run: its finished tasks are not repeated, and
                on one device the result is that of a run without interruption, to the bit. The task that was
                interrupted goes on from its last whole checkpoint (`save_strategy`), or starts over if it has none.
                Without a snapshot in the folder the run begins at the first task.

        Raises:
            ValueError: other arguments, or an interrupted run of another scenario or other settings.
            OSError: the output folder cannot be written to; what was saved before is kept.
        """
        if any(value for value in kwargs.values()):
            raise ValueError(
                f"train() got {kwargs}, but a task sequence is trained as a whole. Call train() with "
                "resume_from_checkpoint or without arguments."
            )
        self.check_not_interrupted()
        if resume_from_checkpoint:
            self.resume(self.folder if resume_from_checkpoint is True else Path(resume_from_checkpoint))
        output = None
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            self.progress.begin_sequence(len(self.scenario), self.finished_tasks)
        try:
            for task in self.scenario[self.finished_tasks :]:
                output = self.train_task(task)
        finally:
            self.progress.end_sequence()
        if self.args.pictures and self.finished_tasks:
            self.draw()
        if self.args.push_to_hub:
            self.push_to_hub()
        return output

    def hyperparameter_search(self, *words: Any, **more: Any) -> None:
        """Refused: a trainer learns its sequence once, and the Trainer's search would start it over in place."""
        raise NotImplementedError(
            "hyperparameter_search would learn the sequence again in one trainer, whose model and record go on from "
            "task to task. Make a model and a trainer, with an output_dir of its own, for each set of settings in a "
            "loop of your own, and compare results.metrics of a scenario of held-out training images."
        )

    def train_task(self, task: Task | Mapping[str, Any], **columns: Any) -> TrainOutput:
        """Start, learn and measure one task, and save adapter and results.

        Args:
            task: the scenario's next task; or a data set with a train and a test split, which is added to the scenario
                as its next task, with classes that are new or known.
            **columns: for a data set, as `Scenario.with_task` has them (`name`, `label_column`, ...).
        """
        self.check_not_interrupted()
        if not isinstance(task, Task):
            task = self._add(task, **columns)
        elif columns:
            raise ValueError(
                f"train_task() got {columns} with a Task, which has its name and columns. Leave them out."
            )
        if self.finished_tasks >= len(self.scenario) or task is not self.scenario[self.finished_tasks]:
            raise ValueError(
                f"{task.name} is not the next task: {self.finished_tasks} of {len(self.scenario)} are learnt. Tasks "
                "are learnt in the scenario's order."
            )
        if self.is_world_process_zero() and not (self.finished_tasks or self._resumed_from):
            self.forget_finished_run()
        self._begin(task)
        if self.args.measure_ahead and task.index == 0:
            self.evaluate()
            self.baseline, self.accuracy_matrix[0] = self.accuracy_matrix[0].tolist(), np.nan
        self.began = time.perf_counter()
        output = self.strategy.learn(self, task)
        if self.args.world_size > 1:
            self.join_counts()
        self.strategy.end_task(self, task)
        self.observe(task)
        self.train_seconds, self.began = self.seconds(), None
        self.evaluate()
        self.finished_tasks, self.under_way = self.finished_tasks + 1, False
        with explained_writes(self.folder, self.finished_tasks - 1):
            self.save()
            self.save_snapshot()
            if self.is_world_process_zero():
                self.forget_checkpoints(self.finished_tasks - 1)  # of the task before: the last one's stay
        self.progress.end_task(self._summary(task))
        return output

    def _add(self, data: Mapping[str, Any], **columns: Any) -> Task:
        """Add a data set to the scenario as its next task."""
        if self.finished_tasks < len(self.scenario):
            raise ValueError(
                f"{self.finished_tasks} of {len(self.scenario)} tasks are learnt, and a task is added to the end. "
                "Call train() first."
            )
        longer = self.scenario.with_task(data, **columns)
        check_fit(self.model, self.args, longer, self.strategy, self.finished_tasks)
        self.take_scenario(longer)
        with explained_writes(self.folder, self.finished_tasks):  # so that an interruption finds the task in it
            self.save_snapshot()
        return longer[-1]

    def _begin(self, task: Task) -> None:
        self.task, self.under_way = task, True
        self.progress.begin_task(task.name, task.index)
        self.look_before(task)
        self._start(task)
        self.strategy.begin_task(self, task)
        self.most_trainable = max(self.most_trainable, self.model.get_nb_trainable_parameters()[0])

    # ----------------------------------------------------------------------------------------------- measuring

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ):
        """Measure accuracy, by default on the test examples of each task seen, which fills a row of the matrix.

        Args:
            eval_dataset: a `Task`, for its test examples; other examples of the scenario's classes; None: the tasks
                seen.

        Returns:
            dict with `eval_loss`, `eval_average_accuracy` (mean over tasks) and `eval_accuracy_<task name>`; for other
            examples `eval_loss` and `eval_accuracy`.
        """
        if eval_dataset is None:
            if self.task is None:
                raise ValueError("No task has begun, so there is nothing to measure. Call train() first.")
            ahead = self.args.measure_ahead and self.began is None  # between tasks
            self._measured = list(self.scenario if ahead else self.scenario[: self.task.index + 1])
            self.selected_rows = []
            eval_dataset = self.examples(self._measured, "test")
        else:
            eval_dataset = self._own_examples(eval_dataset)
        try:
            with self.uncounted(), nullcontext() if self.began is None else self.head_as_if_finished():
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if self.selected_rows:
                sizes = [len(task.test) for task in self._measured]
                rows = self.key_sets * self.tuner.pool.rows_in_use
                self.prompt_usage = row_counts(self.selected_rows, sizes, rows)
        finally:
            measured, self._measured, self.selected_rows = self._measured, [], None
        for task in measured:
            self.accuracy_matrix[self.task.index, task.index] = metrics[f"{metric_key_prefix}_accuracy_{task.name}"]
        return metrics

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"):
        """The Trainer's `predict` for what `evaluate` takes as `eval_dataset`; `predictions` are rows of the head,
        (examples,), whose names are `model.config.id2label`."""
        return super().predict(self._own_examples(test_dataset), ignore_keys, metric_key_prefix)

    def _own_examples(self, data: Any) -> Any:
        """Examples with the labels that their task gives them, or that their own class names have."""
        if isinstance(data, Task):
            return self.examples([data], "test")
        for task in self.scenario:
            for split in ("train", "test"):
                if data is getattr(task, split):
                    return self.examples([task], split, measured=True)
        if self.scenario.task_known or any(task.label_names is not None for task in self.scenario):
            why = (
                "The task of a test image is known in this scenario, but that of these examples is not."
                if self.scenario.task_known
                else "The tasks come from data sets that number their classes differently, so what the labels of "
                "these examples mean is not known."
            )
            raise ValueError(f"{why} Give a Task, or a task's own train or test data.")
        feature = getattr(data, "features", {}).get(self.scenario.label_column)
        names = tuple(feature.names) if isinstance(feature, ClassLabel) else self.scenario.label_names
        if names == self.scenario.label_names:
            return data
        task = Task(0, "given", (), data, data, names)
        if (self.scenario.model_labels(task, "test", self.classes_before) < 0).any():
            raise ValueError(
                f"The examples have labels of {list(names)}, of which the scenario has {list(self.scenario.classes)}. "
                "Remove examples of other classes by filter()."
            )
        return self.examples([task], "test")

    def _accuracies(self, prediction: Any) -> dict[str, float]:
        correct = np.asarray(prediction.predictions) == np.asarray(prediction.label_ids)
        if not self._measured:
            return {"accuracy": float(correct.mean())}
        ends = np.cumsum([len(task.test) for task in self._measured])
        if len(correct) != ends[-1]:
            raise RuntimeError(f"{len(correct)} predictions came back for {ends[-1]} test examples")
        accuracies = [part.mean() for part in np.split(correct, ends[:-1])]
        seen = self.task.index + 1
        if self.began is None:
            self.details = self._details(prediction, np.diff(ends[:seen], prepend=0))
        return {
            "average_accuracy": float(np.mean(accuracies[:seen])),
            **{f"accuracy_{task.name}": float(value) for task, value in zip(self._measured, accuracies, strict=True)},
        }

    def _details(self, prediction: Any, sizes: np.ndarray) -> dict[str, Any]:
        """What is told by predictions for the tasks seen, of so many examples each, beside their accuracies."""
        seen = self.scenario[: len(sizes)]
        asked = self.scenario.boundaries and not self.scenario.task_known
        disjoint = sum(len(task.classes) for task in seen) == len({name for task in seen for name in task.classes})
        return evaluation_details(
            np.asarray(prediction.predictions)[: sizes.sum()],
            np.asarray(prediction.label_ids)[: sizes.sum()],
            np.repeat(np.arange(len(sizes)), sizes),
            list(dict.fromkeys([*self.classes_before, *self.scenario.classes])),
            [task.classes for task in seen] if asked and disjoint else None,
        )

    @property
    def metrics(self) -> dict[str, float]:
        if not self.finished_tasks:
            return {}
        sizes = [len(task.test) for task in self.scenario]
        # A task that was added later has no accuracy from before the first one.
        whole = self.baseline is not None and not np.isnan(self.baseline).any()
        return continual_metrics(self.accuracy_matrix, test_sizes=sizes, baseline=self.baseline if whole else None)

    # ----------------------------------------------------------------------------------------------- results

    def save(self) -> None:
        """Write adapter, processor, `results.json` and card into the output folder; whole files replace old ones."""
        with written_aside(self.folder, self.is_world_process_zero()) as aside:
            self.save_model(str(aside), _internal_call=True)
            if self.is_world_process_zero():
                self.tuner.save_sums(adapter_folder(aside, self.model.active_adapter))
                self.strategy.save(self, aside)
        if self.is_world_process_zero():
            self.results.save(self.folder)
            self.create_model_card()

    def draw(self) -> None:
        """Draw the run into its folder, on the first process; without matplotlib, say what to install."""
        if not self.is_world_process_zero():
            return
        try:
            write_pictures(self.folder, self.results)
        except (ImportError, ValueError, OSError) as error:
            logger.warning("No pictures of %s: %s", self.folder, error)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card with the measured results, which `push_to_hub` shares with the adapter."""
        if self.is_world_process_zero():
            record = self.folder / FILE_NAME
            results = RunResults.load(record) if record.is_file() else self.results
            write_model_card(self.folder, results, limits=self.strategy.limits, adapter_id=self.hub_model_id)

    @property
    def results(self) -> RunResults:
        """The record of the run so far."""
        return record_of(self)

    def _summary(self, task: Task) -> str:
        metrics = self.metrics
        return (
            f"{task.name}: {task.index + 1} of {len(self.scenario)} tasks, {self.train_seconds:.0f} s of training, "
            f"average accuracy {metrics['average_accuracy']:.2%}, forgetting {metrics['forgetting']:.2%}"
        )
