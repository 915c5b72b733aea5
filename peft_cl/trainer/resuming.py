"""The state of a sequence: kept between tasks and within them, and taken up after an interruption."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from ..scenarios import Scenario, Task
from ..tuners.base.merged import layers_of_others
from .files import explained_writes, finish_writing
from .longer import is_longer, start_of_last_task, without_length
from .observing import ObservingTrainer
from .processes import kept_counts
from .provenance import MEASURING, digest_of_examples, measuring
from .record import facts_of, learnt_of, settings_of, usage_of_finished_tasks
from .same_run import alike, has_same_images, of_finished_tasks
from .snapshot import (
    STATE_FOLDER,
    differences,
    forget_folder,
    forget_state,
    load_snapshot,
    random_state,
    save_snapshot,
    seal_checkpoint,
    set_random_state,
    told_of_junk,
    whole_checkpoint,
)
from .without_prompts import WithoutPrompts


logger = logging.get_logger(__name__)


class ResumableTrainer(ObservingTrainer):
    """A trainer that knows how far a sequence is, and goes on where an interrupted run stopped.

    Attributes:
        whole_matrix: (tasks, tasks) array, R[i, j] = accuracy (0 to 1) on task j after task i; NaN if not measured.
            Tasks that the adapter had learnt before this run come first.
        finished_tasks: tasks of the scenario learnt and measured.
        learnt: for each of these, the settings that it was learnt with (`settings`) and what it took (`took`).
        prompt_usage: (tasks seen, rows) counts of the last measurement, None where no rows are chosen.
        without_prompts: what the frozen model's features give on the same tasks.
        details: what the last measurement between tasks tells beside accuracies of tasks, by its field in the record.
        baseline: accuracy on each task before the first is learnt, with `measure_ahead`.
        train_seconds: of the finished tasks, without evaluations.
        most_trainable: parameters that were trained in one task, at most; prompts may be frozen after the first.
        under_way: whether a task has begun and is not finished.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.whole_matrix = self._empty_matrix(self.scenario)
        self.whole_matrix[: self.tasks_before, : self.tasks_before] = self.earlier.matrix
        self._examples: dict[int, str] = {}
        self.finished_tasks = 0
        self.prompt_usage: np.ndarray | None = None
        self.details: dict[str, Any] = {}
        self.baseline: list[float] | None = None
        self.without_prompts = WithoutPrompts()
        self.learnt: list[dict[str, Any]] = []
        self.train_seconds = 0.0
        self.most_trainable = 0
        self.under_way = False
        self._resumed_from: Path | None = None
        self._longer = False  # a finished run whose last task goes on

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)

    def take_scenario(self, scenario: Scenario) -> None:
        """Go on with a longer scenario, whose first tasks are those of the present one."""
        tasks, matrix = len(self.whole_matrix), self._empty_matrix(scenario)
        matrix[:tasks, :tasks] = self.whole_matrix
        self.whole_matrix, self.scenario = matrix, scenario
        if self.baseline is not None:
            self.baseline += [float("nan")] * (len(matrix) - tasks)
        self.make_collators()

    @property
    def accuracy_matrix(self) -> np.ndarray:
        """Of the scenario's tasks, (tasks, tasks): the part of `whole_matrix` that this run measures."""
        return self.whole_matrix[self.tasks_before :, self.tasks_before :]

    def _empty_matrix(self, scenario: Scenario) -> np.ndarray:
        tasks = self.tasks_before + len(scenario)
        return np.full((tasks, tasks), np.nan)

    def check_not_interrupted(self) -> None:
        """Refuse to go on with a task that was interrupted in this process: its parameters are half trained."""
        if self.under_way:
            raise RuntimeError(
                f"{self.task.name} was begun and interrupted: its prompts are half trained. Make model and trainer "
                "anew, and call train(resume_from_checkpoint=True) to go on with this task."
            )

    def seconds(self) -> float:
        """Seconds of training so far, those of the task under way included."""
        return self.train_seconds + (time.perf_counter() - self.began if self.began else 0.0)

    def _start(self, task: Task) -> None:
        """Head and pool start the task; a stream is started once, with all its classes."""
        if self.scenario.boundaries:
            self.tuner.begin_task(task.classes)
        elif task.index == 0:
            self.tuner.begin_stream(self.scenario.classes)

    def learnt_state(self) -> dict[str, Any]:
        """All that training steps change."""
        return {
            "weights": self._own_weights(),
            "head": self.tuner.head.active.going_on(),
            "strategy": self.strategy.state_dict(),
            "random": random_state(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
            # A task has an optimizer of its own, a stream one for all.
            "optimizer": self.optimizer.state_dict() if self.optimizer and not self.scenario.boundaries else None,
        }

    def sequence_state(self) -> dict[str, Any]:
        """All that the tasks to come depend on."""
        return {
            "settings": self.settings(),
            "accuracy_matrix": self.whole_matrix.tolist(),
            "finished_tasks": self.finished_tasks,
            "prompt_usage": usage_of_finished_tasks(self),
            "details": self.details,
            "baseline": self.baseline,
            "learnt": self.learnt,
            "train_seconds": self.seconds(),
            "query_seconds": self.query_seconds,
            "most_trainable": self.most_trainable,
            "flops": self.flops.total,
            "steps": self.steps_before + self.state.global_step,
            "without_prompts": self.without_prompts.state(),
            "grown": getattr(self.tuner.head.config, "grown", None),
            **self.learnt_state(),
        }

    def _own_weights(self) -> dict[str, torch.Tensor]:
        """The adapter's weights, those of the backbone that are trained, and those that a strategy has put into it."""
        model = self.accelerator.unwrap_model(self.model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        others = layers_of_others(self.tuner.encoder.base_layer).values()
        places = {place for layer in others for place in layer.adapter_layer_names}
        prefix = f".{self.tuner.prefix}"
        return {
            name: value
            for name, value in model.state_dict().items()
            if name in trained or prefix in name or not places.isdisjoint(name.split("."))
        }

    def save_snapshot(self) -> None:
        """Write the state between tasks, on the first process."""
        if self.is_world_process_zero():
            save_snapshot(self.folder / STATE_FOLDER, self.sequence_state())

    def resume(self, folder: Path) -> None:
        """Go to where the run in `folder` last finished a task, or nowhere if it finished none."""
        if self.task is not None:
            raise RuntimeError(
                f"This trainer has trained {self.task.name} already, and a run is resumed by a new one. Make model "
                "and trainer anew."
            )
        self._resumed_from = folder
        if self.is_world_process_zero():
            finish_writing(folder)
        state = load_snapshot(folder / STATE_FOLDER)
        if state is None:
            if folder != self.folder and not (folder / STATE_FOLDER).is_dir():
                raise ValueError(
                    f"resume_from_checkpoint is {str(folder)!r}, but no run was interrupted there. Give the output "
                    "folder of the run to go on with."
                )
            return
        with told_of_junk(folder, state):
            finished = state["finished_tasks"] == len(self.scenario)
            if finished and is_longer(state["settings"], self.settings()):
                self._longer = True
                state = start_of_last_task(folder, state, checkpoint_folder(folder, self.scenario[-1]))
            if state is not None:
                self._take_up(state, folder)
                _ = self.results  # what makes no record is told now, and not after the last task

    def _take_up(self, state: Mapping[str, Any], folder: Path) -> None:
        self._check_settings(state, folder)
        measured = np.array(state["accuracy_matrix"], dtype=float)
        first = len(self.whole_matrix) - len(measured)  # runs of earlier versions have no row for tasks before
        if measured.shape != (len(measured), len(measured)) or first not in (0, self.tasks_before):
            raise TypeError(f"accuracies of {measured.shape} tasks")
        self.whole_matrix[first:, first:] = measured
        self.finished_tasks = state["finished_tasks"]
        self.learnt = state.get("learnt") or [learnt_of(self, {}) for _ in range(self.finished_tasks)]
        self.prompt_usage = None if state["prompt_usage"] is None else np.array(state["prompt_usage"])
        self.details, self.baseline = state.get("details", {}), state.get("baseline")
        self.without_prompts.take(state.get("without_prompts", {}))
        self.train_seconds, self.query_seconds = state["train_seconds"], state.get("query_seconds", 0.0)
        if self.flops.counts:
            self.flops.total = state.get("flops") or 0
        # Runs of earlier versions do not say.
        self.steps_before, self.most_trainable = state.get("steps", 0), state.get("most_trainable", 0)
        for task in self.scenario[: self.finished_tasks]:
            self._start(task)  # for the shapes
            self.task = task
        if state.get("grown"):
            self.tuner.pool.take_growth(state["grown"])
        self._take(state)
        self.optimizer_state = state["optimizer"]
        if self.is_world_process_zero():
            set_random_state(state["random"])

    def forget_finished_run(self) -> None:
        """Remove the state of an earlier run in this folder, unless it was interrupted: that would be lost work."""
        try:
            state = load_snapshot(self.folder / STATE_FOLDER)
        except ValueError:  # nothing that could be gone on from
            state = None
        finished = state["finished_tasks"] if state else 0
        tasks = state["settings"]["scenario"]["num_tasks"] if state else len(self.scenario)
        # Before the first task is finished there is no snapshot, but there may be checkpoints.
        begun = state or whole_checkpoint(checkpoint_folder(self.folder, self.scenario[0]))
        if begun and finished < tasks:
            raise ValueError(
                f"In {str(self.folder)!r} a run was interrupted after {finished} of {tasks} tasks. Call "
                "train(resume_from_checkpoint=True) to go on with it; to begin anew, give another output_dir or "
                f"remove {str(self.folder / STATE_FOLDER)!r}."
            )
        forget_state(self.folder)

    def settings(self) -> dict[str, Any]:
        """What must not change while a sequence is under way."""
        settings = settings_of(self)
        for name in ("threads", "device"):  # where it runs, not what
            settings.pop(name)
        what = facts_of(self)
        attention = self.tuner.model.config._attn_implementation
        return {
            **what,
            **settings,
            **measuring(self.args),
            "processor": json.loads(self.processing_class.to_json_string()),
            "learnt_before": {"tasks": self.tasks_before, "classes": list(self.classes_before)},
            "backbone": {"weights": self._backbone, "attention": attention},
            "examples": {task.name: self._digest_of(task) for task in self.scenario},
            # Those that are kept back are the rest of the examples.
            **({"validation": self._digests_of_validation()} if self._validation_was_given() else {}),
        }

    def _validation_was_given(self) -> bool:
        return bool(self.validation) and self.args.validation_fraction is None

    def _digests_of_validation(self) -> dict[str, str]:
        return {task.name: digest_of_examples(self.scenario, task) for task in self.validation}

    def _digest_of(self, task: Task) -> str:
        if task.index not in self._examples:
            self._examples[task.index] = digest_of_examples(self.scenario, task)
        return self._examples[task.index]

    def _check_settings(self, state: Mapping[str, Any], folder: Path) -> None:
        finished = state["finished_tasks"]
        before, now = alike(*(of_finished_tasks(each, finished) for each in (state["settings"], self.settings())))
        if self._longer:
            before, now = without_length(before), without_length(now)
        # Runs of earlier versions do not say when they measured.
        changed = differences(before, {name: now[name] for name in now if name in before or name not in MEASURING})
        added = before["scenario"]["task_names"][len(self.scenario) :]
        remedy = f" If {', '.join(added)} came by train_task, make the scenario with_task(data)." if added else ""
        if changed:
            raise ValueError(
                f"The run in {str(folder)!r} cannot be resumed with other settings: {'; '.join(changed[:5])}. Put "
                f"them back, or train anew without resume_from_checkpoint.{remedy}"
            )

    def _take(self, state: Mapping[str, Any]) -> None:
        self._take_weights(state["weights"])
        self._take_sums(state)
        self.strategy.load_state_dict(state["strategy"])
        scaler = self.accelerator.scaler
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])

    def _take_sums(self, state: Mapping[str, Any]) -> None:
        self.tuner.head.active.go_on(state.get("head") or {})  # runs of earlier versions had none

    def _take_weights(self, weights: Mapping[str, Any]) -> None:
        own = self._own_weights()
        surplus, missing = sorted(weights.keys() - own.keys()), sorted(own.keys() - weights.keys())
        if surplus:
            raise ValueError(
                f"The interrupted run has weights that this model lacks ({', '.join(surplus[:3])}, ...). Make the "
                "model as it was, with the same adapter name."
            )
        if missing:
            raise ValueError(
                f"The interrupted run lacks weights of this model ({', '.join(missing[:3])}, ...): its state is "
                "damaged. Train anew without resume_from_checkpoint, in another output_dir."
            )
        self.accelerator.unwrap_model(self.model).load_state_dict(weights, strict=False)

    def _checkpoint(self) -> str | None:
        """The last whole checkpoint of the task that was interrupted."""
        folder, self._resumed_from = self._resumed_from, None
        checkpoint = whole_checkpoint(checkpoint_folder(folder, self.task)) if folder else None
        if checkpoint is None:
            return None
        if not has_same_images(load_snapshot(checkpoint)["settings"], self.settings(), self.task.name):
            logger.warning("The images of %s are others than in %s: it starts over.", self.task.name, checkpoint)
            return None
        return str(checkpoint)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """What is measured and kept within a task is what all processes counted."""
        joined = self.control.should_evaluate or self.control.should_save
        with self._joined_counts() if joined and self.args.world_size > 1 else nullcontext():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    @contextmanager
    def _joined_counts(self) -> Iterator[None]:
        """Each process has all processes' counts inside the block, and its own again behind it."""
        with kept_counts(self.tuner):
            self.join_counts()
            yield

    def join_counts(self) -> None:
        """Give each process the sum of what the processes counted in this task."""
        self.tuner.merge_counts(lambda counts: self.accelerator.reduce(counts.clone(), "sum"))

    def leave_counts_to_first(self) -> None:
        """Where each process has the sum, have it on the first alone: the sum to come must not hold it twice."""
        if not self.is_world_process_zero():
            self.tuner.merge_counts(torch.zeros_like)

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
        self.train_seconds, self.query_seconds = state["train_seconds"], state.get("query_seconds", 0.0)
        self._take(state)
        self.leave_counts_to_first()

    def _nothing_left(self, checkpoint: str) -> None:
        """The Trainer takes up the random state with the first step only."""
        if self.is_world_process_zero():
            set_random_state(load_snapshot(Path(checkpoint))["random"])

    def _load_best_model(self) -> None:
        state = load_snapshot(Path(self.state.best_model_checkpoint))
        self._take_weights(state["weights"])
        self._take_sums(state)
        self.strategy.load_state_dict(state["strategy"])  # what it learnt with these weights
        self.leave_counts_to_first()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """What is shared is the adapter after a task, not one in the middle of it."""

    def forget_checkpoints(self, finished: int) -> None:
        """Remove the checkpoints of the first `finished` tasks: a snapshot after them holds what they held."""
        for task in self.scenario[:finished]:
            forget_folder(checkpoint_folder(self.folder, task))

    def _get_output_dir(self, trial: Any) -> str:
        """Checkpoints are named by steps, which start anew with every task: each task has its own folder."""
        return str(checkpoint_folder(self.folder, self.task) if self.task else self.folder / STATE_FOLDER)


def checkpoint_folder(run: Path, task: Task) -> Path:
    """Where the checkpoints of a task are; by its number, as its name may be anything."""
    return run / STATE_FOLDER / f"task_{task.index}"
