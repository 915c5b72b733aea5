"""What every head has in common: rows for the classes learnt, logits of features, and what it keeps to go on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn


class Sizes(NamedTuple):
    """Widths of what a head sees: `features`, F, of the (prompted) model; `query`, Q, of the frozen model alone."""

    features: int
    query: int


class Head(nn.Module):
    """Turns features (B, F) into logits (B, classes). A head of your own subclasses it and is entered by
    `register_head`; `examples/custom_head.py` has one.

    There are two kinds. A *trained* head has parameters that the training loss moves. A head that *observes* is
    computed from sums over the training features of each task: after a task the trainer calls `observe` for all of the
    task's images, in evaluation mode, and then `fit`. If prompts are to be learnt under such a head, a linear head
    stands in for it in training (`training_head`).

    Args:
        sizes: widths of what it sees.
        classes: rows to start with.
        **options: a head's own settings (`head_options` in the adapter's configuration).

    Raises:
        ValueError: an option that is out of range. Heads are made once when a configuration is made, so that this is
            told before anything else happens.
    """

    #: Name in tables.
    title: ClassVar[str] = "head"
    #: Whether it is computed from what it observes.
    observes: ClassVar[bool] = False
    #: Whether it reads the frozen model's features of the image beside those of the prompted model.
    needs_query: ClassVar[bool] = False
    #: Whether prompts are learnt under its own logits although nothing of it may be trained.
    guides_prompts: ClassVar[bool] = False
    #: The part of the features that it cannot do without; None: any will do.
    needs_features: ClassVar[str | None] = None

    def __init__(self, sizes: Sizes, classes: int):
        super().__init__()
        self.sizes, self.classes = sizes, classes
        #: What the query says about the task, if the adapter has `task_evidence`.
        self.evidence: nn.Module | None = None
        #: The head that training goes through, if this one is not trained itself.
        self.training_head: Head | None = None

    @property
    def needs_training(self) -> bool:
        """Whether the row of a new class says nothing before the training loss has moved it."""
        return not self.observes

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next((tensor.dtype for tensor in (*self.parameters(), *self.buffers())), torch.float32)

    def forward(self, features: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        """Features (B, F), and for a head with `needs_query` the frozen model's (B, Q) -> logits (B, classes)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(features, query)")

    def foretell(self, query: torch.Tensor) -> torch.Tensor | None:
        """What the frozen model's features (B, Q) alone say of the classes, before there are prompted ones: logits
        (B, classes); None: nothing. Of adapters that were joined, it decides whose prompts an image takes. It is
        called without autocast."""
        return None

    def grow(self, classes: int, *, keep: int) -> None:
        """Have `classes` rows, of which the first `keep` are the present ones; the others begin anew."""
        raise NotImplementedError(f"{type(self).__name__} must define grow(classes, keep=...)")

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Have these rows, in this order, and forget the others: nothing of them may be left."""
        raise NotImplementedError(f"{type(self).__name__} cannot forget classes: define keep_rows(rows)")

    def check_classes(self, classes: int) -> None:
        """Raise a `ValueError` if it cannot tell so many classes apart."""

    @classmethod
    def settle(cls, options: Mapping[str, Any], base: nn.Module) -> Mapping[str, Any]:
        """The options once the classification model `base` is known; a `ValueError` if it does not suit."""
        return options

    def describe(self, names: Sequence[str], base: nn.Module, *, known: bool = False) -> None:
        """Hear the names of its classes, in the order of its rows, when a task begins; or, `known`, when the head is
        made for rows that come from a file."""

    def expect_few(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Be ready for classes with far fewer images than the others have; the options that make such a head."""
        return options

    # ----------------------------------------------------------------------------------------------- observing

    def observe(self, features: torch.Tensor, labels: torch.Tensor, query: torch.Tensor | None = None) -> None:
        """See training examples once: features (B, F), rows of their classes (B,), the frozen model's features."""

    def merge_counts(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Join what each process observed since the last `fit`; `total` sums a tensor over the processes."""

    def fit(self) -> None:
        """Compute the rows from all that was observed."""

    def move(self, old: torch.Tensor, new: torch.Tensor, how: str) -> None:
        """Follow features that training has moved: the same images (N, F) before and after it; see `drift.py`."""

    def forget_observed(self) -> None:
        """Begin the sums anew."""

    # ----------------------------------------------------------------------------------------------- going on

    def going_on(self) -> dict[str, torch.Tensor]:
        """What predicting does not need but learning on and joining do, by name."""
        return {}

    def go_on(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `going_on` gave."""

    def sums_unknown(self) -> None:
        """The rows come from a file: what they were computed from is not known until `go_on`."""

    @property
    def has_sums(self) -> bool:
        """Whether it can learn on: it knows what it has observed (or needs no such knowledge)."""
        return True

    # ----------------------------------------------------------------------------------------------- joining

    def unite(self, heads: Sequence[Head], rows: Sequence[Sequence[int]]) -> None:
        """Know what several heads of this kind and these options know: row i of `heads[k]` is this head's row
        `rows[k][i]`. What this head knew before is gone."""
        raise ValueError(f"{self.title} heads cannot be joined: {type(self).__name__} does not define unite.")

    @property
    def can_divide(self) -> bool:
        """Whether it can go on with some of its rows as if the others had never been; `pick_rows` if not."""
        return self.has_sums

    def pick_rows(self, rows: Sequence[int]) -> None:
        """Have these rows as they are, in this order, to predict with: it need not be able to learn on."""
        self.keep_rows(rows)


#: Name in configurations -> class.
HEADS: dict[str, type[Head]] = {}


def register_head(name: str) -> Callable[[type[Head]], type[Head]]:
    """Enter a head under the name that `head=` in a configuration gives. A module that is loaded again may repeat it.

    Raises:
        ValueError: another head has this name.

    Example:
        >>> @register_head("my-head")         # doctest: +SKIP
        ... class MyHead(Head): ...
    """

    def enter(head: type[Head]) -> type[Head]:
        known = HEADS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (head.__module__, head.__qualname__):
            raise ValueError(f"The head {name!r} is {known.__qualname__} already. Give yours another name.")
        HEADS[name] = head
        return head

    return enter


def make_head(name: str, sizes: Sizes, classes: int, options: Mapping[str, Any], init: str = "default") -> Head:
    """Make the head of this name; `init` says how rows begin in heads whose rows are trained.

    Raises:
        ValueError: no such head, an option that it does not have, or one that is out of range; the message lists what
            there is.
    """
    if name not in HEADS:
        raise ValueError(
            f"head is {name!r}, but must be one of {', '.join(map(repr, HEADS))}. A head of your own must be imported "
            "first: its module calls register_head."
        )
    kind = HEADS[name]
    known = option_names(kind)
    unknown = [option for option in options if option not in known]
    if unknown:
        rule = f"has the options {', '.join(known)}. Give some of these" if known else "has no options. Leave it out"
        raise ValueError(f"head_options has {', '.join(map(repr, unknown))}, but the head {name!r} {rule}.")
    # How a class's row begins is a matter of heads whose rows are trained.
    begin = {"init": init} if "init" in _parameters(kind) else {}
    return kind(sizes, classes, **begin, **options)


def option_names(kind: type[Head]) -> tuple[str, ...]:
    """Names of a head's own settings."""
    return tuple(name for name in _parameters(kind) if name not in ("sizes", "classes", "init"))


def _parameters(kind: type[Head]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind).parameters)
