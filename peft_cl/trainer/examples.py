"""Examples of a data set with tensors of our own beside its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset


class WithTensors(TorchDataset):
    """A data set's examples, each with its row of every tensor under the tensor's name.

    Args:
        examples: the data.
        tensors: name -> tensor (examples, ...), in the same order.
    """

    def __init__(self, examples: Dataset, tensors: Mapping[str, torch.Tensor]):
        self.examples = examples
        self.tensors = dict(tensors)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.examples[index], **{name: tensor[index] for name, tensor in self.tensors.items()}}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = self.examples.__getitems__(indices)
        return [
            {**row, **{name: tensor[index] for name, tensor in self.tensors.items()}}
            for row, index in zip(rows, indices, strict=True)
        ]
