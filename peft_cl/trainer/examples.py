"""The examples of tasks, with what belongs to each of them, and what was chosen for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback

from ..scenarios import Task


if TYPE_CHECKING:
    from .bad_images import ImageReader


class TaskExamples(TorchDataset):
    """Examples of several data sets one after the other, each with its row of every tensor under the tensor's name.

    The data sets are not joined into one: they may differ in their columns and in what a label id means.

    With `images` a batch is not a list of examples but one mapping of tensors, the images under `image_bytes`.

    With a `seed` each example also brings a `draw`, the seed of its augmentation: a number of its own in every epoch,
    the same whatever process or worker fetches it, and whatever was fetched before. With `draws` they come again after
    as many epochs, and `drawn` holds tensors (draws, examples, ...) of what belongs to an example in an epoch.

    Args:
        parts: the data.
        tensors: name -> tensor (examples, ...), in the same order.
        seed: whole numbers of at least 0; None: no draws.
        images: for each data set, its images (examples, 3, H, W) uint8, which then need not be fetched from it.
        draws: after how many epochs draws come again; None: never.
        reader: reads the data sets' images; None: they are handed on as the data sets give them.
        names: for each data set, the name of its task and the split, which a message about an image has.
    """

    def __init__(
        self,
        parts: Sequence[Dataset],
        tensors: Mapping[str, torch.Tensor],
        seed: Sequence[int] | None = None,
        images: Sequence[torch.Tensor] | None = None,
        draws: int | None = None,
        reader: ImageReader | None = None,
        names: Sequence[tuple[str | None, str]] = (),
    ):
        self.parts = list(parts)
        self.reader, self.names = reader, list(names)
        self.images = images
        self.tensors = dict(tensors)
        self.seed = seed
        self.draws = draws
        self.drawn: dict[str, torch.Tensor] = {}
        # In shared memory, where workers that live on see it change.
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    def begin_epoch(self, epoch: int) -> None:
        """Other draws from now on."""
        self.epoch.fill_(epoch % self.draws if self.draws else epoch)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.images is not None:
            return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]] | dict[str, torch.Tensor]:
        if self.images is not None:
            return self._batch(torch.as_tensor(indices))
        examples: list[Any] = [None] * len(indices)
        for part, places, rows in self._places(indices):
            rows = self._read(part, rows.tolist())
            for place, row in zip(places, rows, strict=True):
                own = {name: tensor[indices[place]] for name, tensor in self.tensors.items()}
                own |= {name: tensor[int(self.epoch), indices[place]] for name, tensor in self.drawn.items()}
                if self.seed is not None:
                    own["draw"] = self._draw(indices[place])
                examples[place] = {**row, **own}
        return examples

    def _read(self, part: int, rows: list[int]) -> list[dict[str, Any]]:
        if self.reader is None:
            return self.parts[part].__getitems__(rows)
        return self.reader.read(self.parts[part], rows, *self.names[part])

    def _places(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each data set that examples come from: its number, their places in the batch, and its rows."""
        part_of = np.searchsorted(self.starts, indices, side="right") - 1
        for part in np.unique(part_of):
            places = np.flatnonzero(part_of == part)
            yield part, places, np.asarray(indices)[places] - self.starts[part]

    def _batch(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        images = torch.empty(len(indices), *self.images[0].shape[1:], dtype=torch.uint8)
        for part, places, rows in self._places(indices.numpy()):
            images[torch.from_numpy(places)] = self.images[part][torch.from_numpy(rows)]
        return {"image_bytes": images, **{name: tensor[indices] for name, tensor in self.tensors.items()}}

    def _draw(self, index: int) -> int:
        entropy = [*self.seed, int(self.epoch), int(index)]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


class EpochDraws(TrainerCallback):
    """Tells the training examples which epoch it is; accelerate's loader tells either the sampler or the data set."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.train_dataset.begin_epoch(int(state.epoch or 0))


def places_of(task: Task) -> np.ndarray:
    """Places of all training images of a task, int64 (images, 2): the task's number and the row in its data."""
    rows = np.arange(len(task.train))
    return np.stack([np.full_like(rows, task.index), rows], axis=1)


def has_transform(data: Dataset) -> bool:
    """Whether the data set hands its examples through a function (`with_transform`), which may draw at random."""
    return data.format["type"] == "custom"


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
