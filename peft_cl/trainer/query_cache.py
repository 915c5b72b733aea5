"""Query features of a data set, computed once where they are the same each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset

from ..scenarios import Task
from ..tuners.base.model import PromptPoolModel


class QueryCache:
    """Query features of tasks, kept in memory for the length of a run.

    The backbone is frozen and the query pass runs in evaluation mode, so an image that is not augmented has the same
    feature in every epoch and every evaluation. Test images always qualify; training images only without augmentation,
    and nothing does if the backbone is trained or the pool has no use for a query.
    """

    def __init__(self, training_images: bool):
        self.training_images = training_images
        # By identity, with the data set itself, so that no other can take its place while its queries are kept.
        self._queries: dict[int, tuple[Dataset, torch.Tensor]] = {}

    def queries(
        self, tasks: Sequence[Task], split: str, tuner: PromptPoolModel, loader: Callable[[Task, str], Any]
    ) -> torch.Tensor | None:
        """Queries of the tasks' `"train"` or `"test"` examples one after the other, (examples, D) float32, or None
        where they cannot be kept.

        Args:
            loader: makes an iterable of un-augmented batches, in order, of a task's split.
        """
        pool = tuner.pool
        useful = pool.needs_query or pool.query_is_feature
        frozen = not any(parameter.requires_grad for parameter in tuner.encoder.base_layer.parameters())
        if not (useful and frozen) or (split == "train" and not self.training_images):
            return None
        for task in tasks:
            data = getattr(task, split)
            if id(data) not in self._queries:
                batches = [tuner.query(batch["pixel_values"]).float().cpu() for batch in loader(task, split)]
                self._queries[id(data)] = data, torch.cat(batches)
        return torch.cat([self._queries[id(getattr(task, split))][1] for task in tasks])

    def forget(self, tasks: Sequence[Task]) -> None:
        """Drop the training queries of tasks that are learnt."""
        for task in tasks:
            self._queries.pop(id(task.train), None)
