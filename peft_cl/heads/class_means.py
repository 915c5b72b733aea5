"""Nearest class mean."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from .checks import check_choice, check_number
from .head import Sizes, register_head
from .solved import SolvedHead


@register_head("ncm")
class ClassMeansHead(SolvedHead):
    """The nearest mean of the training features of each class (Janson et al. 2022, arXiv 2210.04428).

    In Euclidean distance this is a linear head: with features and means taken from the mean m of all images,
    -|f - mu_c|^2 / 2 = f mu_c - |mu_c|^2 / 2 - |f|^2 / 2, whose last term is the same for all classes. In cosine it is
    `scale` cos(f, mu_c).

    Args:
        metric: `"euclidean"` or `"cosine"`.
        scale: of the cosines, so that their softmax is not flat.
        normalize: bring each feature to length 1 before the mean is taken (iCaRL, arXiv 1611.07725, Alg. 1), so that
            images with large features count no more than others.
    """

    title = "nearest class mean"
    keeps_gram = False

    def __init__(
        self,
        sizes: Sizes,
        classes: int,
        *,
        metric: Literal["euclidean", "cosine"] = "euclidean",
        scale: float = 16.0,
        normalize: bool = False,
    ):
        self.metric = check_choice("metric", metric, ("euclidean", "cosine"))
        self.scale = check_number("scale", scale, above=0)
        self.normalize = check_choice("normalize", normalize, (True, False))
        super().__init__(sizes, classes)

    def map(self, features):
        return F.normalize(features, dim=-1) if self.normalize else features

    def _map_settings(self):
        return (*super()._map_settings(), self.normalize)

    def forward(self, features, query=None):
        return super().forward(F.normalize(features.float(), dim=-1) if self.metric == "cosine" else features)

    def solve(self, sums):
        means = sums.means
        if self.metric == "cosine":
            return self.scale * F.normalize(means, dim=-1), torch.zeros_like(means[:, 0]), None
        offsets = means - sums.mean
        return offsets, -offsets.square().sum(-1) / 2, sums.mean
