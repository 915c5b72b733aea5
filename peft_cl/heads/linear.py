"""The linear head of the papers, trained by the cross-entropy; and the cosine head, which compares directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check_number
from .head import Head, Sizes, register_head


Init = Literal["default", "zeros", "trunc_normal"]


class TrainedRows(Head):
    """A head with a parameter row for each class. A subclass draws new rows in `draw`.

    Args:
        init: how a new class's row begins (`head_init` in the adapter's configuration).
    """

    #: Parameters that have a row for each class.
    row_names: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, sizes: Sizes, classes: int, init: Init = "default"):
        super().__init__(sizes, classes)
        self.init = init
        for name, rows in self.draw(classes).items():
            self.register_parameter(name, nn.Parameter(rows))

    def draw(self, classes: int) -> dict[str, torch.Tensor]:
        """New values of the parameters in `row_names`, by name, (classes, ...)."""
        raise NotImplementedError(f"{type(self).__name__} must define draw(classes)")

    def grow(self, classes, *, keep):
        for name, rows in self.draw(classes).items():
            old = getattr(self, name)
            new = rows.to(old)
            with torch.no_grad():
                new[:keep] = old[:keep]
            setattr(self, name, nn.Parameter(new.detach(), requires_grad=old.requires_grad))
        self.classes = classes

    def keep_rows(self, rows: Sequence[int]) -> None:
        for name in self.row_names:
            old = getattr(self, name)
            kept = old.detach()[list(rows)].clone()
            setattr(self, name, nn.Parameter(kept, requires_grad=old.requires_grad))
        self.classes = len(rows)

    @torch.no_grad()
    def unite(self, heads, rows):
        """A class of several heads has the mean of their rows, and so has what belongs to no class."""
        for name, own in self.named_parameters(recurse=False):
            theirs = [getattr(head, name).to(own) for head in heads]
            if name not in self.row_names:
                own.copy_(torch.stack(theirs).mean(0))
                continue
            place = torch.tensor([row for of_head in rows for row in of_head], device=own.device)
            total = torch.zeros_like(own).index_add_(0, place, torch.cat(theirs))
            heard = torch.bincount(place, minlength=len(own)).clamp_min(1)
            own.copy_(total / heard.view(-1, *[1] * (own.ndim - 1)))


@register_head("linear")
class LinearHead(TrainedRows):
    """`weight` f + `bias`, as L2P, DualPrompt and CODA-Prompt have it. Rows of `weight` are (F,)."""

    title = "linear"
    row_names = ("weight", "bias")

    def draw(self, classes):
        # With no rows nothing is drawn: torch warns of empty tensors.
        linear = nn.Linear(self.sizes.features, classes) if classes and self.init == "default" else None
        if linear is not None:
            return {"weight": linear.weight.detach(), "bias": linear.bias.detach()}
        weight = torch.zeros(classes, self.sizes.features)
        if classes and self.init == "trunc_normal":
            nn.init.trunc_normal_(weight, std=0.02)
        return {"weight": weight, "bias": torch.zeros(classes)}

    @torch.no_grad()
    def copy_from(self, classifier: nn.Linear) -> None:
        """Take the rows of another classifier of the same size; a missing bias is 0."""
        self.weight.copy_(classifier.weight)
        if classifier.bias is None:
            nn.init.zeros_(self.bias)
        else:
            self.bias.copy_(classifier.bias)

    @property
    def in_features(self) -> int:
        """F, by the name that `nn.Linear` has for it."""
        return self.sizes.features

    @property
    def out_features(self) -> int:
        """Classes, by the name that `nn.Linear` has for them."""
        return self.classes

    def forward(self, features, query=None):
        return F.linear(features, self.weight, self.bias)


@register_head("cosine")
class CosineHead(TrainedRows):
    """eta cos(w_c, f): rows of new classes are no longer than those of old ones (LUCIR, Hou et al., CVPR 2019, eq. 2).

    Rows begin as normal noise whatever `head_init` says: a row of zeros has no direction.

    Args:
        scale: where eta, which is learnt, begins; the logits lie between -eta and eta.
    """

    title = "cosine"

    def __init__(self, sizes: Sizes, classes: int, init: Init = "default", *, scale: float = 16.0):
        check_number("scale", scale, above=0)
        super().__init__(sizes, classes, init)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def draw(self, classes):
        return {"weight": torch.randn(classes, self.sizes.features) * 0.02}

    def forward(self, features, query=None):
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))  # eq. 2
