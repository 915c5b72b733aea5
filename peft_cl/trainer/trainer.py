"""The trainer of a task sequence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from ..hub.card import write_model_card
from ..metrics import RunResults, continual_metrics
from ..metrics.results import FILE_NAME
from ..scenarios import Scenario, Task
from .arguments import ContinualTrainingArguments
from .checks import check_fit
from .examples import row_counts
from .files import check_writable, explained_writes, written_aside
from .record import record_of, usage_of_finished_tasks
from .snapshot import (
    STATE_FOLDER,
    differences,
    forget_state,
    load_snapshot,
    random_state,
    save_snapshot,
    seal_checkpoint,
    set_random_state,
    whole_checkpoint,
)
from .strategy import Combined, Strategy
from .task_trainer import TaskTrainer


class ContinualTrainer(TaskTrainer):
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
        strategy: a comparison method, or a list of them; None trains the adapter as it is.
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
        >>> trainer.train_task(load_dataset("user/snakes"), name="snakes")  # weeks later    # doctest: +SKIP
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
        strategy: Strategy | Sequence[Strategy] | None = None,
        **kwargs: Any,
    ):
        strategy = Combined(strategy) if isinstance(strategy, (list, tuple)) else strategy or Strategy()
        check_fit(model, args, scenario, processing_class, strategy)
        if args.process_index == 0:
            check_writable(Path(args.output_dir))
        strategy.prepare(model)
        super().__init__(
            model,
            args,
            scenario,
            processing_class,
            augmentation,
            batch_augmentation,
            strategy,
            compute_metrics=self._accuracies,
            **kwargs,
        )
        tasks = len(scenario)
        self.accuracy_matrix = np.full((tasks, tasks), np.nan)
        self.finished_tasks = 0
        self.train_seconds = 0.0
        self._began: float | None = None
        self._measured: list[Task] = []
        self.prompt_usage: np.ndarray | None = None
        self._resuming = False

    # ----------------------------------------------------------------------------------------------- the sequence

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs: Any) -> TrainOutput | None:
        """Learn all tasks of the scenario. Returns the last task's `TrainOutput` (None if all were learnt before).

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
        if resume_from_checkpoint:
            self.resume(self.folder if resume_from_checkpoint is True else Path(resume_from_checkpoint))
        elif self.is_world_process_zero() and not (self.finished_tasks or self._resuming):
            forget_state(self.folder)  # of an earlier run
        output = None
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            self.progress.begin_sequence(len(self.scenario), self.finished_tasks)
        try:
            for task in self.scenario[self.finished_tasks :]:
                output = self.train_task(task)
        finally:
            self.progress.end_sequence()
        if self.args.push_to_hub:
            self.push_to_hub()
        return output

    def train_task(self, task: Task | Mapping[str, Any], **columns: Any) -> TrainOutput:
        """Start, learn and measure one task, and save adapter and results.

        Args:
            task: the scenario's next task; or a data set with a train and a test split, which is added to the scenario
                as its next task, with classes that are new or known.
            **columns: for a data set, as `Scenario.with_task` has them (`name`, `label_column`, ...).
        """
        if not isinstance(task, Task):
            longer = self.scenario.with_task(task, **columns)
            check_fit(self.model, self.args, longer, self.processing_class, self.strategy, self.finished_tasks)
            self.scenario = longer
            matrix = np.full((len(self.scenario), len(self.scenario)), np.nan)
            matrix[:-1, :-1] = self.accuracy_matrix
            self.accuracy_matrix, task = matrix, self.scenario[-1]
        if task is not self.scenario[self.finished_tasks]:
            raise ValueError(
                f"{task.name} is not the next task: {self.finished_tasks} of {len(self.scenario)} are learnt. Tasks "
                "are learnt in the scenario's order."
            )
        self._begin(task)
        self._began = time.perf_counter()
        output = self.strategy.learn(self, task)
        if self.args.world_size > 1:
            self.tuner.merge_counts(lambda counts: self.accelerator.reduce(counts.clone(), "sum"))
        self.strategy.end_task(self, task)
        self.train_seconds, self._began = self._seconds(), None
        self.evaluate()
        self.finished_tasks += 1
        with explained_writes(self.folder, self.finished_tasks - 1):
            self.save()
            if self.is_world_process_zero():
                save_snapshot(self.folder / STATE_FOLDER, self.sequence_state())
        self.progress.end_task(self._summary(task))
        return output

    def _begin(self, task: Task) -> None:
        begun = self.tuner.peft_config[self.model.active_adapter].num_tasks - self.tasks_before
        if self.scenario.boundaries and begun > self.finished_tasks:
            raise RuntimeError(
                f"{task.name} was begun and interrupted: its prompts are half trained. Make model and trainer anew, "
                "and call train(resume_from_checkpoint=True) to go on with this task."
            )
        self.task = task
        self.progress.begin_task(task.name, task.index)
        self._start(task)
        self.strategy.begin_task(self, task)

    def _seconds(self) -> float:
        """Seconds of training so far, those of the task under way included."""
        return self.train_seconds + (time.perf_counter() - self._began if self._began else 0.0)

    def _start(self, task: Task) -> None:
        """Head and pool start the task; a stream is started once, with all its classes."""
        if self.scenario.boundaries:
            self.tuner.begin_task(task.classes)
        elif task.index == 0:
            self.tuner.begin_stream(self.scenario.classes)

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)

    # ----------------------------------------------------------------------------------------------- interruption

    def sequence_state(self) -> dict[str, Any]:
        """All that the tasks to come depend on."""
        model = self.accelerator.unwrap_model(self.model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        prefix = f".{self.tuner.prefix}"
        weights = {name: value for name, value in model.state_dict().items() if name in trained or prefix in name}
        return {
            "settings": self.settings(),
            "accuracy_matrix": self.accuracy_matrix.tolist(),
            "finished_tasks": self.finished_tasks,
            "prompt_usage": usage_of_finished_tasks(self),
            "train_seconds": self._seconds(),
            "weights": weights,
            "strategy": self.strategy.state_dict(),
            "random": random_state(),
            # A task has an optimizer of its own, a stream one for all.
            "optimizer": self.optimizer.state_dict() if self.optimizer and not self.scenario.boundaries else None,
        }

    def resume(self, folder: Path) -> None:
        """Go to where the run in `folder` last finished a task, or nowhere if it finished none."""
        self._resuming = True
        state = load_snapshot(folder / STATE_FOLDER)
        if state is None:
            return
        self._check_settings(state, folder)
        self.accuracy_matrix = np.array(state["accuracy_matrix"])
        self.finished_tasks = state["finished_tasks"]
        self.prompt_usage = None if state["prompt_usage"] is None else np.array(state["prompt_usage"])
        self.train_seconds = state["train_seconds"]
        for task in self.scenario[: self.finished_tasks]:
            self._start(task)  # for the shapes
            self.task = task
        self._take(state)
        self.optimizer_state = state["optimizer"]
        if self.is_world_process_zero():
            set_random_state(state["random"])

    def settings(self) -> dict[str, Any]:
        """What must not change while a sequence is under way."""
        settings = {**self.results.hyperparameters}
        for name in ("threads", "device", "devices"):  # where it runs, not what
            settings.pop(name)
        return {"scenario": self.scenario.describe(), "method": self.results.method, **settings}

    def _check_settings(self, state: Mapping[str, Any], folder: Path) -> None:
        changed = differences(state["settings"], self.settings())
        if changed:
            raise ValueError(
                f"The run in {str(folder)!r} cannot be resumed with other settings: {'; '.join(changed[:5])}. Put "
                "them back, or train anew without resume_from_checkpoint."
            )

    def _take(self, state: Mapping[str, Any]) -> None:
        self.accelerator.unwrap_model(self.model).load_state_dict(state["weights"], strict=False)
        self.strategy.load_state_dict(state["strategy"])

    def _checkpoint(self) -> str | None:
        """The last whole checkpoint of the task that was interrupted."""
        resuming, self._resuming = self._resuming, False
        checkpoint = whole_checkpoint(Path(self._get_output_dir(None))) if resuming else None
        return None if checkpoint is None else str(checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's checkpoint, with the state of the sequence in it, and older ones removed when it is whole."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(self._get_output_dir(trial))
        try:
            with explained_writes(self.folder, self.finished_tasks):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # each process writes its random state
                if self.is_world_process_zero():
                    checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                    save_snapshot(checkpoint, self.sequence_state())
                    seal_checkpoint(checkpoint)
                    best = self.state.best_model_checkpoint
                    rotate_checkpoints(str(folder), limit, best_model_checkpoint=best)
        finally:
            self.args.save_total_limit = limit

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Not the adapter alone, as the Trainer would: all that is trained, and what the strategy keeps."""
        state = load_snapshot(Path(resume_from_checkpoint))
        self._check_settings(state, Path(resume_from_checkpoint))
        self.train_seconds = state["train_seconds"]
        self._take(state)

    def _nothing_left(self, checkpoint: str) -> None:
        """The Trainer takes up the random state with the first step only."""
        if self.is_world_process_zero():
            set_random_state(load_snapshot(Path(checkpoint))["random"])

    def _load_best_model(self) -> None:
        weights = load_snapshot(Path(self.state.best_model_checkpoint))["weights"]
        self.accelerator.unwrap_model(self.model).load_state_dict(weights, strict=False)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """What is shared is the adapter after a task, not one in the middle of it."""

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
            self.selected_rows = []
            eval_dataset = self.examples(self._measured, "test")
        try:
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

    # ----------------------------------------------------------------------------------------------- results

    def save(self) -> None:
        """Write adapter, processor and `results.json` into the output folder; old files are replaced by whole ones."""
        with written_aside(self.folder, self.is_world_process_zero()) as aside:
            self.save_model(str(aside), _internal_call=True)
        if self.is_world_process_zero():
            self.strategy.save(self, self.folder)
            self.results.save(self.folder)

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
