"""The examples of tasks, with what belongs to each of them, and what was chosen for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset


class TaskExamples(TorchDataset):
    """Examples of several data sets one after the other, each with its row of every tensor under the tensor's name.

    The data sets are not joined into one: they may differ in their columns and in what a label id means.

    With a `seed` each example also brings a `draw`, the seed of its augmentation: a number of its own in every epoch,
    the same whatever process or worker fetches it, and whatever was fetched before.

    Args:
        parts: the data.
        tensors: name -> tensor (examples, ...), in the same order.
        seed: whole numbers of at least 0; None: no draws.
    """

    def __init__(
        self, parts: Sequence[Dataset], tensors: Mapping[str, torch.Tensor], seed: Sequence[int] | None = None
    ):
        self.parts = list(parts)
        self.tensors = dict(tensors)
        self.seed = seed
        # In shared memory, where workers that live on see it change.
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    def begin_epoch(self, epoch: int) -> None:
        """Other draws from now on."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        part_of = np.searchsorted(self.starts, indices, side="right") - 1
        examples: list[Any] = [None] * len(indices)
        for part in np.unique(part_of):
            places = np.flatnonzero(part_of == part)
            rows = self.parts[part].__getitems__([int(indices[place] - self.starts[part]) for place in places])
            for place, row in zip(places, rows, strict=True):
                own = {name: tensor[indices[place]] for name, tensor in self.tensors.items()}
                if self.seed is not None:
                    own["draw"] = self._draw(indices[place])
                examples[place] = {**row, **own}
        return examples

    def _draw(self, index: int) -> int:
        entropy = [*self.seed, int(self.epoch), int(index)]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def rows_by_image(selected: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows chosen for a batch, (B, N) or (sets, B, N), as (B, choices); the sets' rows are counted on, `rows` each."""
    if selected.ndim == 2:
        return selected
    first = torch.arange(len(selected), device=selected.device)[:, None, None] * rows
    return (selected + first).movedim(0, 1).flatten(1).contiguous()


def row_counts(selected: Sequence[torch.Tensor], sizes: Sequence[int], width: int) -> np.ndarray:
    """How often each row of a pool was chosen for the examples of each task.

    Args:
        selected: row numbers (examples, choices) of the batches of an evaluation, in order.
        sizes: examples of each task.
        width: rows there are.

    Returns:
        int64 array (tasks, rows).
    """
    rows = torch.cat(list(selected)).cpu()
    return np.stack([np.bincount(part.flatten().numpy(), minlength=width) for part in rows.split(list(sizes))])
