"""The data of tasks as a Trainer goes through it: examples with labels and queries, batches, loaders."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer

from ..scenarios import Task
from .examples import TaskExamples
from .processes import over_processes


class TaskData(Trainer):
    """The part of `TaskTrainer`, which sets all that this reads, that has to do with data."""

    def examples(
        self, tasks: Sequence[Task], split: str, *, measured: bool = False, images: float | None = None
    ) -> TaskExamples:
        """The tasks' `"train"` or `"test"` examples one after the other, with what belongs to each of them: its label
        in the order of the model's outputs, its query where that is kept, its task where that is known at test.

        Args:
            measured: whether training examples are to be measured on, as test examples are.
            images: how many images will be gone through, None: all of them, and more than once.
        """
        labels = [self.scenario.model_labels(task, split, self.classes_before) for task in tasks]
        tensors = {"model_label": torch.from_numpy(np.concatenate(labels))}
        # For fewer images than there are, the queries of all would take longer than they save, unless files keep them.
        count = sum(len(getattr(task, split)) for task in tasks)
        if self.args.cache_queries and (images is None or images >= count or self.args.query_cache_dir):
            tensors["query"] = self.kept_queries(tasks, split)
        if (split == "test" or measured) and self.scenario.task_known:
            numbers = torch.tensor([self.tasks_before + task.index for task in tasks])
            sizes = torch.tensor([len(getattr(task, split)) for task in tasks])
            tensors["task_ids"] = numbers.repeat_interleave(sizes)
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        augmented = split == "train" and self.augmentation is not None
        # What is trained on, so that two tasks' draws differ.
        seed = [self.args.seed, *(task.index for task in tasks)] if augmented else None
        parts = [getattr(task, split) for task in tasks]
        draws = self.args.augmentation_draws
        names = [(task.name, split) for task in tasks]
        images = None if augmented else self._image_bytes(parts, names)
        examples = TaskExamples(parts, tensors, seed, images, draws, self.reader, names)
        come_again = augmented and draws and self.batch_augmentation is None
        if come_again and self.args.cache_queries and self.queries.are_fixed(self.tuner):
            examples.drawn["query"] = torch.stack([self._queries_of_draw(examples, draw) for draw in range(draws)])
        return examples

    def kept_queries(self, tasks: Sequence[Task], split: str) -> torch.Tensor | None:
        """Queries of the tasks' examples, (examples, D), where they are kept; they are computed once, with a bar."""

        def queries(task: Task, split: str) -> torch.Tensor:
            def of_rows(rows: Sequence[int]) -> torch.Tensor:
                batches = self.plain_batches(task, split, rows=rows)
                return self._queries_of(self.progress.counted(batches, self._count_batches(rows), "queries"))

            return over_processes(self.accelerator, len(getattr(task, split)), of_rows)

        began = time.perf_counter()
        counted = self.flops.counted() if split == "train" else nullcontext()
        with self.uncounted(), counted, self.accelerator.autocast():  # in the precision of the steps
            found = self.queries.queries(tasks, split, self.tuner, queries)
        if split == "train":
            self.query_seconds += time.perf_counter() - began
        return found

    def _queries_of_draw(self, examples: TaskExamples, draw: int) -> torch.Tensor:
        """Queries of augmented images, (examples, D) float32."""
        examples.begin_epoch(draw)
        with self.flops.counted(), self.accelerator.autocast():
            return over_processes(
                self.accelerator,
                len(examples),
                lambda rows: self._queries_of(self.batches_of(examples, training=True, rows=rows)),
            )

    def _queries_of(self, batches: Iterable[dict[str, torch.Tensor]]) -> torch.Tensor:
        return torch.cat([self.tuner.query(batch["pixel_values"]).float().cpu() for batch in batches])

    def _count_batches(self, rows: Sequence[int]) -> int:
        return -(-len(rows) // self.args.eval_batch_size)

    def part_of(self, task: Task, rows: Sequence[int]) -> Task:
        """The task with some of its training examples, in the order of `rows`. `forget` it after use."""
        part = replace(task, train=task.train.select(rows))
        if self.images is not None:
            self.images.take(part.train, task.train, rows)
        return part

    def forget(self, tasks: Sequence[Task]) -> None:
        """Let go of what is kept of the training examples of `tasks`; files stay."""
        self.queries.forget(tasks)
        if self.images is not None:
            for task in tasks:
                self.images.forget(task.train)

    def forget_learnt(self, tasks: Sequence[Task]) -> None:
        """`forget` what was learnt and observed; tasks that are gone through together come again."""
        if len(tasks) == 1:
            self.forget(tasks)

    def _image_bytes(self, parts: Sequence[Dataset], names: Sequence[tuple[str, str]]) -> list[torch.Tensor] | None:
        if self.images is None:
            return None
        self.images.names.update({id(part): name for part, name in zip(parts, names, strict=True)})
        return [self.images.of(part) for part in parts]

    def training_batch(self, examples: TaskExamples, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Some of the examples as a batch of training, augmented as others are, on the device."""
        examples.begin_epoch(int(torch.randint(2**62, ())))  # other draws each time
        return self._prepare_inputs(self._collators[True](examples.__getitems__(indices)))

    def plain_batches(
        self,
        task: Task,
        split: str = "train",
        batch_size: int | None = None,
        rows: Sequence[int] | None = None,
        with_queries: bool = False,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Un-augmented batches of all of a task's examples (or of `rows`), in order, on this process alone."""
        return self.batches_of(self.plain_examples(task, split, with_queries), batch_size, rows=rows)

    def plain_examples(self, task: Task, split: str = "train", with_queries: bool = False) -> TaskExamples:
        """A task's examples without augmentation, for `batches_of`, with the queries that are kept if asked for."""
        tensors = {"model_label": torch.from_numpy(self.scenario.model_labels(task, split, self.classes_before))}
        if with_queries:
            tensors["query"] = self.kept_queries([task], split)
        parts, names = [getattr(task, split)], [(task.name, split)]
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        images = self._image_bytes(parts, names)
        return TaskExamples(parts, tensors, images=images, reader=self.reader, names=names)

    def batches_of(
        self,
        examples: TaskExamples,
        batch_size: int | None = None,
        training: bool = False,
        rows: Sequence[int] | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of all of the examples (or of `rows`), in order, on this process alone."""
        # A generator of its own: the order of the training images must not depend on whether queries are cached.
        loader = DataLoader(
            examples,
            batch_size or self.args.eval_batch_size,
            sampler=rows,
            collate_fn=self._collators[training],
            generator=torch.Generator(),
        )
        return (self._prepare_inputs(batch) for batch in loader)

    def get_train_dataloader(self):
        self.data_collator = self._collators[True]
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = self._collators[False]

    def _get_train_sampler(self, train_dataset=None):
        if self.scenario.boundaries:
            return super()._get_train_sampler(train_dataset)
        return SequentialSampler(train_dataset or self.train_dataset)  # the order of a stream is the data

    def get_eval_dataloader(self, eval_dataset=None):
        # Kept loaders are found by a name that all data sets given as objects share: a stale one would be served.
        self.__dict__.pop("_eval_dataloaders", None)
        with self._every_example():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._every_example():
            return super().get_test_dataloader(test_dataset)

    def evaluation_loop(self, dataloader, *words, **more):
        try:
            return super().evaluation_loop(dataloader, *words, **more)
        finally:
            # accelerate keeps each loader until a training begins, with the queries of all tasks seen; a head that is
            # computed begins none.
            loaders = self.accelerator._dataloaders
            loaders[:] = [each for each in loaders if each is not dataloader]

    @contextmanager
    def _every_example(self) -> Iterator[None]:
        """Incomplete batches are dropped in training only; every test image counts."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last
