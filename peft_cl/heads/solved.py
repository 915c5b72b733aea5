"""The base of heads whose rows are solved from sums over features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check_choice
from .drift import move_sums
from .head import Head, Sizes
from .sums import Sums


class SolvedHead(Head):
    """logits = `weight` (h - `center`) + `bias`, for the mapped feature h = `map(f)` in R^M.

    A subclass defines `solve`, and gives a `mapping` if features do not enter as they are. Predicting needs the
    buffers alone: `weight` (C, M), `bias` (C,), `center` (M,) and `seen` (C,), which classes it has images of. The
    sums are not among them: they are needed to learn on, to join and to forget, and are kept beside the adapter
    (`files.py`). A class without images gets a logit below all others.

    Args:
        by_class: keep the sums of each class apart, so that `forget_classes` can take one out.
        mapping: a module that makes h (B, M) of features (B, F) and does not depend on the data, with M as its `width`
            (`maps.py`); None: h = f.
    """

    observes = True
    #: Whether G is needed.
    keeps_gram: ClassVar[bool] = True

    def __init__(self, sizes: Sizes, classes: int, *, by_class: bool = False, mapping: nn.Module | None = None):
        super().__init__(sizes, classes)
        self.mapping = mapping
        self.by_class = check_choice("by_class", by_class, (True, False))
        width = self.width
        self.register_buffer("weight", torch.zeros(classes, width))
        self.register_buffer("bias", torch.zeros(classes))
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))
        #: Of all images up to the last `fit`; None if the adapter was loaded and they were not.
        self.sums: Sums | None = self.empty_sums()
        #: Of the images observed since, on this process; None if there are none.
        self.pending: Sums | None = None

    @property
    def width(self) -> int:
        """M."""
        return self.sizes.features if self.mapping is None else self.mapping.width

    def map(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F) -> h (B, M)."""
        return features if self.mapping is None else self.mapping(features)

    def solve(self, sums: Sums) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Rows (C, M), biases (C,), and the center (M,) or None for 0, in float64."""
        raise NotImplementedError(f"{type(self).__name__} must define solve(sums)")

    def forward(self, features, query=None):
        # A difference of large numbers: in 16 bits nothing would be left of it.
        with torch.autocast(features.device.type, enabled=False):
            mapped = self.map(features.to(self.weight.dtype))
            logits = F.linear(mapped - self.center, self.weight, self.bias)
            return below_the_seen(logits, self.seen)

    # ----------------------------------------------------------------------------------------------- rows

    def grow(self, classes, *, keep):
        self.check_classes(classes)
        for name in ("weight", "bias", "seen"):
            old = getattr(self, name)[:keep]
            setattr(self, name, torch.cat([old, old.new_zeros(classes - keep, *old.shape[1:])]))
        if self.sums is not None:
            self.sums.grow(classes)
        self.classes = classes

    def keep_rows(self, rows: Sequence[int]) -> None:
        if self.sums is None:
            raise ValueError(
                "The adapter was loaded without the sums of its head, so no class can be taken out of them. Keep "
                "`head_sums.safetensors` beside the adapter's file."
            )
        self.sums.keep(rows)
        self._index(rows)
        self.fit()

    @property
    def can_divide(self) -> bool:
        return self.sums is not None and self.sums.gram is None

    def pick_rows(self, rows: Sequence[int]) -> None:
        self.sums_unknown()
        self._index(rows)

    def _index(self, rows: Sequence[int]) -> None:
        self.classes = len(rows)
        self.weight, self.bias, self.seen = (each[list(rows)] for each in (self.weight, self.bias, self.seen))

    # ----------------------------------------------------------------------------------------------- observing

    @torch.no_grad()
    def observe(self, features, labels, query=None):
        labels = torch.as_tensor(labels)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ValueError(
                f"labels reach from {int(labels.min())} to {int(labels.max())}, but the head knows the classes 0 to "
                f"{self.classes - 1}. Call begin_task with the new classes' names first."
            )
        with torch.autocast(features.device.type, enabled=False):
            mapped = self.map(features.detach().to(self.weight.dtype))
        finite = mapped.isfinite().all(-1)
        if not finite.all():
            left_out = len(finite) - int(finite.sum())
            warnings.warn(
                f"{left_out} of {len(finite)} images have features that are not finite, and were left out of the "
                "head's sums. A backbone in float16 overflows: load it in bfloat16 or float32.",
                stacklevel=2,
            )
            mapped, labels = mapped[finite], labels.to(finite.device)[finite]
        if self.pending is None:
            self.pending = self.empty_sums()
        self.pending.observe(mapped, labels)

    def merge_counts(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.pending is not None:
            self.pending.merge(total)

    @torch.no_grad()
    def fit(self):
        if self.pending is not None:
            self.sums.to(self.pending.counts.device)
            self.sums.add(self.pending)
            self.pending = None
        weight, bias, center = self.solve(self.sums)
        self.weight, self.bias = weight.to(self.weight), bias.to(self.bias)
        self.center = torch.zeros_like(self.center) if center is None else center.to(self.center)
        self.seen = (self.sums.counts > 0).to(self.seen.device)

    def move(self, old, new, how):
        if self.sums is not None:
            move_sums(self.sums, *(self.map(each.to(self.weight)) for each in (old, new)), how)

    def forget_observed(self):
        self.sums, self.pending = self.empty_sums(), None

    def empty_sums(self) -> Sums:
        """Sums of no images."""
        return Sums(self.classes, self.width, self.keeps_gram, self.keeps_gram and self.by_class)

    # ----------------------------------------------------------------------------------------------- going on

    def sums_unknown(self) -> None:
        self.sums = self.pending = None

    @property
    def has_sums(self) -> bool:
        return self.sums is not None

    def going_on(self):
        parts = {"sums": self.sums, "pending": self.pending}
        return {
            f"{part}.{name}": value
            for part, sums in parts.items()
            if sums is not None
            for name, value in sums.packed().items()
        }

    def go_on(self, state: Mapping[str, torch.Tensor]) -> None:
        for part in ("sums", "pending"):
            packed = {
                name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")
            }
            setattr(self, part, self._checked(packed) if packed else None)

    def _checked(self, packed: Mapping[str, torch.Tensor]) -> Sums:
        """The sums, if they are of this head's kind. Compared as they are kept, before they are made whole."""
        expected = {name: tuple(value.shape) for name, value in self.empty_sums().packed().items()}
        found = {name: tuple(value.shape) for name, value in packed.items()}
        if expected != found:
            raise ValueError(
                f"The sums have the sizes {found}, but this head's are {expected}. They are of another backbone, of "
                "another head or of other classes: take the file that was saved with this adapter."
            )
        return Sums.unpacked(packed)

    def unite(self, heads: Sequence[Head], rows: Sequence[Sequence[int]]) -> None:
        """The rows are solved from the sums of all heads."""
        self.forget_observed()
        again = set()
        for head, places in zip(heads, rows, strict=True):
            before = self.sums.totals.clone()
            self.add(head, places)
            again |= {row for row in places if _is_doubled(before[row], self.sums.totals[row])}
        if again:
            warnings.warn(
                f"{len(again)} of {self.classes} classes have the same sums in several of the adapters, so they were "
                "learnt from the same images, which now count twice. Their means are right; in 'lda' and 'ridge' "
                "they weigh more than other classes. Join adapters of which one alone has learnt these classes.",
                stacklevel=2,
            )
        self.fit()

    def add(self, other: Head, rows: Sequence[int]) -> None:
        """Add what another head of this kind observed; its row i is this head's row `rows[i]`. Then call `fit`."""
        is_alike = type(other) is type(self) and other.width == self.width
        if not is_alike or self._map_settings() != other._map_settings():
            raise ValueError(
                f"A {self.title} head of width {self.width} cannot take in the sums of a {other.title} head with "
                "other settings. Join adapters whose configurations have the same head, head_options and "
                "head_features."
            )
        if self.sums is None or other.sums is None:
            raise ValueError(
                "One of the adapters was loaded without the sums of its head. Keep `head_sums.safetensors` beside the "
                "adapter's file, and load it with is_trainable=True."
            )
        for sums in filter(None, (other.sums, other.pending)):
            self.sums.add(sums, rows)

    def _map_settings(self) -> tuple:
        """What two heads must have in common for their sums to be of the same h."""
        return (self.by_class,)


def _is_doubled(before: torch.Tensor, after: torch.Tensor) -> bool:
    return bool(before.any()) and torch.equal(after.to(before), 2 * before)


def below_the_seen(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The logits (B, C), in which classes without images are below all others; finite."""
    lowest = logits.masked_fill(~seen, torch.inf).amin(-1, keepdim=True) - 10
    return torch.where(seen, logits, lowest.where(lowest.isfinite(), 0.0)) if logits.shape[-1] else logits
