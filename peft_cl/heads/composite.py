"""A head that is made of heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from .head import Head


class CompositeHead(Head):
    """Hands on to the heads inside it what all of them have to do: growing, forgetting, and the keeping of sums.

    A subclass makes the parts in its `__init__`, and defines `forward` and `observe`.
    """

    #: Attributes that hold the parts. Those that may refuse to forget a class come first.
    part_names: ClassVar[tuple[str, ...]]

    @property
    def parts(self) -> dict[str, Head]:
        """The heads inside it, by name."""
        return {name: getattr(self, name) for name in self.part_names}

    def grow(self, classes: int, *, keep: int) -> None:
        for part in self.parts.values():
            part.grow(classes, keep=keep)
        self.classes = classes

    def keep_rows(self, rows: Sequence[int]) -> None:
        for part in self.parts.values():
            part.keep_rows(rows)
        self.classes = len(rows)

    @property
    def can_divide(self) -> bool:
        return all(part.can_divide for part in self.parts.values())

    def pick_rows(self, rows: Sequence[int]) -> None:
        for part in self.parts.values():
            part.pick_rows(rows)
        self.classes = len(rows)

    def unite(self, heads: Sequence[Head], rows: Sequence[Sequence[int]]) -> None:
        for name, part in self.parts.items():
            part.unite([getattr(head, name) for head in heads], rows)

    def check_classes(self, classes: int) -> None:
        for part in self.parts.values():
            part.check_classes(classes)

    def describe(self, names: Sequence[str], base: nn.Module, *, known: bool = False) -> None:
        for part in self.parts.values():
            part.describe(names, base, known=known)

    def merge_counts(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for part in self.parts.values():
            part.merge_counts(total)

    def fit(self) -> None:
        for part in self.parts.values():
            part.fit()

    def forget_observed(self) -> None:
        for part in self.parts.values():
            part.forget_observed()

    def sums_unknown(self) -> None:
        for part in self.parts.values():
            part.sums_unknown()

    @property
    def has_sums(self) -> bool:
        return all(part.has_sums for part in self.parts.values())

    def going_on(self) -> dict[str, torch.Tensor]:
        return {f"{name}.{key}": value for name, part in self.parts.items() for key, value in part.going_on().items()}

    def go_on(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, part in self.parts.items():
            own = f"{name}."
            part.go_on({key.removeprefix(own): value for key, value in state.items() if key.startswith(own)})
