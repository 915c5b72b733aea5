"""Query features of a data set, computed once where they are the same each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Dataset as TorchDataset

from ..scenarios import Task
from ..tuners.base.model import PromptPoolModel


class WithQueries(TorchDataset):
    """A task's examples, each with the frozen model's feature of its image under `"query"`.

    Args:
        examples: the task's data.
        queries: (examples, D) float32, in the same order.
    """

    def __init__(self, examples: Dataset, queries: torch.Tensor):
        self.examples = examples
        self.queries = queries

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.examples[index], "query": self.queries[index]}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = self.examples.__getitems__(indices)
        return [{**row, "query": self.queries[index]} for row, index in zip(rows, indices, strict=True)]


class QueryCache:
    """Query features of a scenario's tasks, kept in memory for the length of a run.

    The backbone is frozen and the query pass runs in evaluation mode, so an image that is not augmented has the same
    feature in every epoch and every evaluation. Test images always qualify; training images only without augmentation,
    and nothing does if the backbone is trained or the pool has no use for a query.
    """

    def __init__(self, training_images: bool):
        self.training_images = training_images
        self._queries: dict[tuple[int, str], torch.Tensor] = {}

    def examples(
        self, tasks: Sequence[Task], split: str, tuner: PromptPoolModel, loader: Callable[[Dataset], Any]
    ) -> Dataset | WithQueries:
        """The tasks' `"train"` or `"test"` examples one after the other, with queries where they can be kept.

        Args:
            loader: makes an iterable of un-augmented batches, in order, from a data set.
        """
        data = concatenate_datasets([getattr(task, split) for task in tasks])
        pool = tuner.pool
        useful = pool.needs_query or pool.query_is_feature
        frozen = not any(parameter.requires_grad for parameter in tuner.encoder.base_layer.parameters())
        if not (useful and frozen) or (split == "train" and not self.training_images):
            return data
        for task in tasks:
            if (task.index, split) not in self._queries:
                batches = [tuner.query(batch["pixel_values"]).float().cpu() for batch in loader(getattr(task, split))]
                self._queries[task.index, split] = torch.cat(batches)
        return WithQueries(data, torch.cat([self._queries[task.index, split] for task in tasks]))

    def forget(self, task: Task) -> None:
        """Drop the training queries of a task that is learnt."""
        self._queries.pop((task.index, "train"), None)
