"""The trainer of a task sequence."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from ..metrics import RunResults, continual_metrics
from ..scenarios import ContinualCollator, ImageTransform, Scenario, Task
from ..tuners.base.model import PromptPoolModel
from .arguments import ContinualTrainingArguments
from .checks import check_fit, check_image_size
from .examples import WithTensors
from .learning_rates import set_rates
from .progress import SequenceProgress
from .provenance import dataset_name, hyperparameters, model_name, versions
from .query_cache import QueryCache
from .snapshot import differences, forget_snapshots, load_snapshot, random_state, save_snapshot, set_random_state
from .strategy import Strategy


class ContinualTrainer(Trainer):
    """A `transformers.Trainer` that learns the tasks of a scenario one after the other and measures as it goes.

    For each task the model's head and pool start the task, optimizer and schedule are new, and the arguments hold as
    for a training of its own. After it, all tasks seen are evaluated, and adapter and results are saved.

    Args:
        model: a `PeftModel` with one of this library's configurations.
        args: `ContinualTrainingArguments`; epochs and steps count per task.
        scenario: the tasks.
        processing_class: the backbone's HF image processor.
        augmentation: applied to each training image (PIL in, PIL out), for instance `RandomResizedCropFlip(size=224)`.
        strategy: a comparison method; None trains the adapter as it is.
        **kwargs: further arguments of `transformers.Trainer` (callbacks, ...).

    Attributes:
        accuracy_matrix: (tasks, tasks) array, R[i, j] = accuracy (0 to 1) on task j after task i; NaN if not measured.
        metrics: average accuracy, average incremental accuracy, forgetting, backward transfer (fractions).
        results: the record of the run, as saved in `results.json`.

    Raises:
        ValueError: anything that cannot work, before training starts.

    Example:
        >>> trainer = ContinualTrainer(model, args, scenario, processing_class=processor)    # doctest: +SKIP
        >>> trainer.train()                                                                  # doctest: +SKIP
        >>> trainer.metrics["average_accuracy"]                                              # doctest: +SKIP
    """

    def __init__(
        self,
        model: PeftModel,
        args: ContinualTrainingArguments,
        scenario: Scenario,
        *,
        processing_class: Any,
        augmentation: Callable | None = None,
        strategy: Strategy | None = None,
        **kwargs: Any,
    ):
        self.strategy = strategy or Strategy()
        check_fit(model, args, scenario, processing_class, self.strategy)
        self.scenario = scenario
        self.strategy.prepare(model)
        config = model.peft_config[model.active_adapter]
        # An adapter that has learnt tasks before goes on: the rows of its head come first.
        self.tasks_before = config.num_tasks
        label_index = scenario.label_index(config.classes if config.tasks else ())
        self._collators = {
            training: ContinualCollator(
                ImageTransform(processing_class, augmentation if training else None),
                label_index,
                scenario.image_column,
                scenario.label_column,
                label_names=scenario.label_names,
            )
            for training in (True, False)
        }
        check_image_size(model, self._collators[False].transform.output_size)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collators[False],
            train_dataset=scenario[0].train,
            processing_class=processing_class,
            compute_metrics=self._accuracies,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
            **kwargs,
        )
        self.progress = SequenceProgress()
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(self.progress)
        self.pop_callback(PrinterCallback)
        tasks = len(scenario)
        self.accuracy_matrix = np.full((tasks, tasks), np.nan)
        self.train_seconds = 0.0
        self.queries = QueryCache(training_images=augmentation is None)
        self.task: Task | None = None
        self._measured: list[Task] = []
        self._losses: dict[str, torch.Tensor] = {}
        self._losses_counted = 0

    # ----------------------------------------------------------------------------------------------- the sequence

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs: Any) -> TrainOutput | None:
        """Learn all tasks of the scenario. Returns the last task's `TrainOutput` (None if all were learnt before).

        Args:
            resume_from_checkpoint: True, or the folder of an interrupted run: its finished tasks are not repeated, and
                on one device the result is that of a run without interruption, to the bit. The task that was
                interrupted starts over. Without a snapshot in the folder the run begins at the first task.

        Raises:
            ValueError: other arguments, or an interrupted run of another scenario or other settings.
        """
        if any(value for value in kwargs.values()):
            raise ValueError(
                f"train() got {kwargs}, but a task sequence is trained as a whole. Call train() with "
                "resume_from_checkpoint or without arguments."
            )
        if resume_from_checkpoint:
            self.resume(Path(self.args.output_dir if resume_from_checkpoint is True else resume_from_checkpoint))
        elif self.is_world_process_zero() and not self.finished_tasks:
            forget_snapshots(Path(self.args.output_dir))  # of an earlier run
        output = None
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            self.progress.begin_sequence(len(self.scenario), self.finished_tasks)
        try:
            for task in self.scenario[self.finished_tasks :]:
                output = self.train_task(task)
        finally:
            self.progress.end_sequence()
        return output

    def train_task(self, task: Task) -> TrainOutput:
        """Start, learn and measure one task, and save adapter and results."""
        if self._tuner.peft_config[self.model.active_adapter].num_tasks > self.tasks_before + self.finished_tasks:
            raise RuntimeError(
                f"{self.scenario[self.finished_tasks].name} was begun and interrupted: its prompts are half trained. "
                "Make model and trainer anew, and call train(resume_from_checkpoint=True) to go on with this task."
            )
        self.task = task
        self.progress.begin_task(task.name, task.index)
        self._tuner.begin_task(task.classes)
        began = time.perf_counter()
        output = self.strategy.learn(self, task)
        if self.args.world_size > 1:
            self._tuner.merge_counts(lambda counts: self.accelerator.reduce(counts.clone(), "sum"))
        self.train_seconds += time.perf_counter() - began
        self.evaluate()
        self.save()
        if self.is_world_process_zero():
            save_snapshot(Path(self.args.output_dir), self.sequence_state())
        self.progress.end_task(self._summary(task))
        return output

    def fit(self, task: Task) -> TrainOutput:
        """The Trainer's own loop over the task's examples, with everything that belongs to a task made anew."""
        # The Trainer keeps its optimizer, its schedule and its wrapped model from one train() to the next: rows that
        # the task brought would be in none of them, and an evaluation before would switch DDP off.
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        self.train_dataset = self._examples([task], "train")
        self._losses, self._losses_counted = {}, 0
        try:
            return super().train()
        finally:
            self.queries.forget(task)

    # ----------------------------------------------------------------------------------------------- interruption

    def sequence_state(self) -> dict[str, Any]:
        """All that the tasks to come depend on."""
        model = self.accelerator.unwrap_model(self.model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        prefix = f".{self._tuner.prefix}"
        weights = {name: value for name, value in model.state_dict().items() if name in trained or prefix in name}
        return {
            "settings": self.settings(),
            "accuracy_matrix": self.accuracy_matrix.tolist(),
            "train_seconds": self.train_seconds,
            "weights": weights,
            "strategy": self.strategy.state_dict(),
            "random": random_state(),
        }

    def resume(self, folder: Path) -> None:
        """Go to where the run in `folder` last finished a task."""
        state = load_snapshot(folder)
        if state is None:
            return
        changed = differences(state["settings"], self.settings())
        if changed:
            raise ValueError(
                f"The run in {str(folder)!r} cannot be resumed with other settings: {'; '.join(changed[:5])}. Put "
                "them back, or train anew without resume_from_checkpoint."
            )
        self.accuracy_matrix = np.array(state["accuracy_matrix"])
        self.train_seconds = state["train_seconds"]
        for task in self.scenario[: self.finished_tasks]:
            self._tuner.begin_task(task.classes)  # for the shapes
            self.task = task
        self.accelerator.unwrap_model(self.model).load_state_dict(state["weights"], strict=False)
        self.strategy.load_state_dict(state["strategy"])
        if self.is_world_process_zero():
            set_random_state(state["random"])

    def settings(self) -> dict[str, Any]:
        """What must not change while a sequence is under way."""
        settings = {**self.results.hyperparameters}
        for name in ("threads", "device", "devices"):  # where it runs, not what
            settings.pop(name)
        return {"scenario": self.scenario.describe(), "strategy": self.strategy.name, **settings}

    # ----------------------------------------------------------------------------------------------- training

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with `learning_rates` where parts have rates of their own."""
        optimizer = super().create_optimizer(model)
        if self.args.learning_rates:
            set_rates(optimizer, self.model, self.args.learning_rates)
        return optimizer

    @property
    def finished_tasks(self) -> int:
        """Tasks learnt and measured."""
        return int(sum(~np.isnan(np.diagonal(self.accuracy_matrix))))

    @property
    def _tuner(self) -> PromptPoolModel:
        return self.accelerator.unwrap_model(self.model).base_model

    # ----------------------------------------------------------------------------------------------- measuring

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ):
        """Measure accuracy, by default on the test examples of each task seen, which fills a row of the matrix.

        Args:
            eval_dataset: other examples of the scenario's classes; None: the tasks seen.

        Returns:
            dict with `eval_loss`, `eval_average_accuracy` (mean over tasks) and `eval_accuracy_<task name>`; for other
            examples `eval_loss` and `eval_accuracy`.
        """
        if eval_dataset is None:
            if self.task is None:
                raise ValueError("No task has begun, so there is nothing to measure. Call train() first.")
            self._measured = list(self.scenario[: self.task.index + 1])
            eval_dataset = self._examples(self._measured, "test")
        try:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            measured, self._measured = self._measured, []
        for task in measured:
            self.accuracy_matrix[self.task.index, task.index] = metrics[f"{metric_key_prefix}_accuracy_{task.name}"]
        return metrics

    def _accuracies(self, prediction: Any) -> dict[str, float]:
        correct = np.asarray(prediction.predictions) == np.asarray(prediction.label_ids)
        if not self._measured:
            return {"accuracy": float(correct.mean())}
        ends = np.cumsum([len(task.test) for task in self._measured])
        if len(correct) != ends[-1]:
            raise RuntimeError(f"{len(correct)} predictions came back for {ends[-1]} test examples")
        accuracies = [part.mean() for part in np.split(correct, ends[:-1])]
        return {
            "average_accuracy": float(np.mean(accuracies)),
            **{f"accuracy_{task.name}": float(value) for task, value in zip(self._measured, accuracies, strict=True)},
        }

    @property
    def metrics(self) -> dict[str, float]:
        return continual_metrics(self.accuracy_matrix) if self.finished_tasks else {}

    # ----------------------------------------------------------------------------------------------- losses

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            for name, value in self._tuner.head.last_losses.items():
                self._losses[name] = self._losses.get(name, 0.0) + value
            self._losses_counted += 1
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside the loss, log its terms one by one: means since the last log."""
        if "loss" in logs and self._losses_counted:
            means = {name: float(value) / self._losses_counted for name, value in self._losses.items()}
            logs = {**logs, **means, "task": self.task.index}
            self._losses, self._losses_counted = {}, 0
        super().log(logs, start_time)

    # ----------------------------------------------------------------------------------------------- data

    def _examples(self, tasks: Sequence[Task], split: str) -> Any:
        """The tasks' examples one after the other, with what belongs to each of them."""
        examples = concatenate_datasets([getattr(task, split) for task in tasks])
        tensors = {}
        if self.args.cache_queries:
            tensors["query"] = self.queries.queries(tasks, split, self._tuner, self.plain_batches)
        if split == "test" and self.scenario.task_known:
            numbers = torch.tensor([self.tasks_before + task.index for task in tasks])
            tensors["task_ids"] = numbers.repeat_interleave(torch.tensor([len(task.test) for task in tasks]))
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return WithTensors(examples, tensors) if tensors else examples

    def plain_batches(self, examples: Any) -> Iterator[dict[str, torch.Tensor]]:
        """Un-augmented batches of all examples, in order, on this process alone."""
        # A generator of its own: the order of the training images must not depend on whether queries are cached.
        generator = torch.Generator()
        loader = DataLoader(
            examples, self.args.eval_batch_size, collate_fn=self._collators[False], generator=generator
        )
        return (self._prepare_inputs(batch) for batch in loader)

    def get_train_dataloader(self):
        self.data_collator = self._collators[True]
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = self._collators[False]

    def get_eval_dataloader(self, eval_dataset=None):
        # Kept loaders are found by a name that all data sets given as objects share: a stale one would be served.
        self.__dict__.pop("_eval_dataloaders", None)
        # Incomplete batches are dropped in training only; every test image counts.
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _get_output_dir(self, trial):
        """Checkpoints are named by steps, which start anew with every task: each task has its own folder."""
        return os.path.join(self.args.output_dir, self.task.name if self.task else "")

    # ----------------------------------------------------------------------------------------------- results

    def save(self) -> None:
        """Write adapter, processor and `results.json` into the output folder."""
        self.save_model(self.args.output_dir)
        if self.is_world_process_zero():
            self.strategy.save(self, Path(self.args.output_dir))
            self.results.save(self.args.output_dir)

    @property
    def results(self) -> RunResults:
        """The record of the run so far."""
        trainable, total = self.model.get_nb_trainable_parameters()
        weights = Path(self.args.output_dir, SAFETENSORS_WEIGHTS_NAME)
        config = self._tuner.peft_config[self._tuner.active_adapters[0]]
        return RunResults(
            method=self.strategy.name or config.title,
            peft_type=config.peft_type.value,
            base_model=model_name(self.model),
            dataset=dataset_name(self.scenario),
            scenario=self.scenario.describe(),
            seed=self.args.seed,
            task_names=[task.name for task in self.scenario],
            accuracy_matrix=self.accuracy_matrix.tolist(),
            test_sizes=[len(task.test) for task in self.scenario],
            metrics=self.metrics,
            trainable_parameters=trainable,
            total_parameters=total,
            adapter_bytes=self.strategy.saved_bytes(self, weights.stat().st_size) if weights.is_file() else None,
            train_seconds=self.train_seconds,
            hyperparameters=hyperparameters(
                self.args, self.model, config, self._collators[True].transform.augmentation
            ),
            versions=versions(),
            command=None,
            finished_tasks=self.finished_tasks,
        )

    def _summary(self, task: Task) -> str:
        metrics = self.metrics
        return (
            f"{task.name}: {task.index + 1} of {len(self.scenario)} tasks, {self.train_seconds:.0f} s of training, "
            f"average accuracy {metrics['average_accuracy']:.2%}, forgetting {metrics['forgetting']:.2%}"
        )
