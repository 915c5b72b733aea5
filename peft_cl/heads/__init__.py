"""Heads: what turns features into logits over the classes learnt, a file each. `HEADS` has them by name."""

from __future__ import annotations

from .aligned import AlignedHead
from .class_means import ClassMeansHead
from .evidence import TaskEvidence
from .features import CLS, OWN, Features
from .fusion import FusionHead
from .head import HEADS, Head, Sizes, make_head, register_head
from .lda import LDAHead
from .linear import CosineHead, LinearHead
from .ridge import RidgeHead
from .solved import SolvedHead
from .sums import Sums
from .text import TextHead


__all__ = [
    "CLS",
    "HEADS",
    "OWN",
    "AlignedHead",
    "ClassMeansHead",
    "CosineHead",
    "Features",
    "FusionHead",
    "Head",
    "LDAHead",
    "LinearHead",
    "RidgeHead",
    "Sizes",
    "SolvedHead",
    "Sums",
    "TaskEvidence",
    "TextHead",
    "make_head",
    "register_head",
]
