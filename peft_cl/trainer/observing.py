"""What a task brings for heads that are computed from what they observe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from transformers.trainer_utils import TrainOutput

from ..heads import Head
from ..scenarios import Task
from .processes import over_processes, share_of
from .task_trainer import TaskTrainer


#: Training images that a pool is shown before a task.
LOOKED_AT = 256


class ObservingTrainer(TaskTrainer):
    """A `TaskTrainer` that shows each task's training images to a head that observes, once, after its training."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        #: Features of the task's training images before its training, (examples, F), where sums are to follow them.
        self._features_before: torch.Tensor | None = None

    def fit(self, tasks: Sequence[Task]) -> TrainOutput | None:
        """Train, if there is anything to train: a head on frozen features may be computed without."""
        return super().fit(tasks) if self._trains() else None

    def _trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.model.parameters())

    def look_before(self, task: Task) -> None:
        """Before `task` begins: keep what its images' features are, if sums are to follow the drift of features."""
        config = self.tuner.head.config
        is_first = not config.tasks
        follows = config.drift_compensation and self.scenario.boundaries and not is_first
        self._features_before = self.features_of_all(task) if follows else None

    def show_pool(self, task: Task) -> None:
        """Once `task` has begun: show the pool some of its images, if it has settings that depend on them."""
        if not self.tuner.wants_images:
            return
        rows = np.random.default_rng((self.args.seed, task.index)).permutation(len(task.train))[:LOOKED_AT]
        batches = [batch["pixel_values"] for batch in self.plain_batches(task, rows=sorted(rows.tolist()))]
        with self.accelerator.autocast():
            looks = [self.tuner.looks_of(batch) for batch in batches]
        seen = [torch.cat(parts).float() for parts in zip(*looks, strict=True)]
        self.tuner.look(*(broadcast(each.contiguous()) for each in seen))  # the same to the bit on every process

    def observe(self, task: Task) -> None:
        """Show the head what `task` was learnt from, and compute it."""
        head = self.tuner.head.active
        if not head.observes:
            return
        self.tuner.need_sums()
        # A stream is observed as it comes, in its steps; without steps it is gone through here, in its order.
        if self.scenario.boundaries or not self._trains():
            tasks = self.strategy.observed(self, task)
            if any(each is not task for each in tasks):  # all of them come again
                head.forget_observed()
            if self._features_before is not None:
                head.move(self._features_before, self.features_of_all(task), self.tuner.head.config.drift_compensation)
            for each in tasks:
                self._show(each, head)
            if self.args.world_size > 1:
                head.merge_counts(lambda counts: self.accelerator.reduce(counts, "sum"))
        head.fit()

    def _show(self, task: Task, head: Head) -> None:
        """This process's share of the task's training images."""
        own = range(self.args.process_index, len(task.train), self.args.world_size)
        features = self._kept_features(task)
        if features is not None:
            labels = torch.from_numpy(self.scenario.model_labels(task, "train", self.classes_before))
            device = self.args.device
            for part in torch.tensor(own).split(1024):
                head.observe(features[part].to(device), labels[part].to(device))
            return
        left = len(own)
        for batch in self._each_batch(task, share_of(len(task.train), self.accelerator)):
            with self.accelerator.autocast():  # in the precision of the evaluation
                found = self.tuner.features(batch["pixel_values"], batch.get("query"))
            # A row that fills up the share is another process's.
            features, query = (None if each is None else each[:left] for each in found)
            head.observe(features, batch["labels"][:left], query)
            left -= len(features)

    def features_of_all(self, task: Task) -> torch.Tensor:
        """Features of all of the task's training images, (examples, F), on the CPU; the same on every process."""

        def of_rows(rows: Sequence[int]) -> torch.Tensor:
            found = []
            for batch in self._each_batch(task, rows):
                with self.accelerator.autocast():
                    features, _ = self.tuner.features(batch["pixel_values"], batch.get("query"))
                found.append(features.float().cpu())
            return torch.cat(found)

        return over_processes(self.accelerator, len(task.train), of_rows)

    def _kept_features(self, task: Task) -> torch.Tensor | None:
        """What the head reads of the task's training images, if it is the frozen model's features, which are kept."""
        if not self.args.cache_queries or not self.tuner.pool.query_is_feature:
            return None
        return self.kept_queries([task], "train")

    def _each_batch(self, task: Task, rows: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
        batches = self.plain_batches(task, rows=rows, with_queries=self.args.cache_queries)
        return self.progress.counted(batches, self._count_batches(rows), "head")

    @contextmanager
    def head_as_if_finished(self) -> Iterator[None]:
        """Inside the block, within a task, the head is what it would be if the training ended here."""
        head = self.tuner.head.active
        if not head.observes:
            yield
            return
        state = {name: value.clone() for name, value in head.state_dict().items()}
        sums = {name: value.clone() for name, value in head.going_on().items()}
        try:
            self.observe(self.task)
            yield
        finally:
            head.load_state_dict(state)
            head.go_on(sums)
