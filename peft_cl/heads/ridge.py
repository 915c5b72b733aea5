"""Ridge regression on one-hot targets, of the features themselves or of a random projection."""

from __future__ import annotations

import torch

from .checks import check_choice, check_count, check_number
from .head import Sizes, register_head
from .maps import RandomProjection
from .solved import SolvedHead
from .sums import Sums, solve_positive


@register_head("ridge")
class RidgeHead(SolvedHead):
    """RanPAC (McDonnell et al., NeurIPS 2023, arXiv 2307.02251) with `projection`, else as LayUP (arXiv 2312.08888)
    and ACIL (arXiv 2205.14922) have it:

        (1)  h = relu(f W_r),  W_r ~ N(0, 1)^(F x M) drawn once   [without a projection: h = f]
        (2)  W = (G + lambda I)^-1 Q^T,   lambda = `ridge` tr(G) / M
        (3)  logit_c = h W_c / sigma^2,   sigma^2 = (N - 2 tr(Q W) + tr(W^T G W)) / (N C).

    RanPAC draws lambda anew for each task; relative to the trace one value holds for all. The division by the variance
    of the residuals in (3) turns scores, which lie between 0 and 1, into log-likelihoods of an isotropic Gaussian, so
    that their softmax is of use; it does not change which class is first. `scale` is 1 / sigma^2.

    Args:
        projection: M; None: no projection. At least as many as there are classes.
        ridge: lambda in parts of the mean eigenvalue of G; None: 0.1 with a projection and 0.01 without, as held back
            training images had it (`benchmarks/heads.py --holdout 0.2`).
        normalize: as in `RandomProjection`.
        seed: of W_r.
        by_class: as in `SolvedHead`.
    """

    title = "ridge"

    def __init__(
        self,
        sizes: Sizes,
        classes: int,
        *,
        projection: int | None = None,
        ridge: float | None = None,
        normalize: bool = False,
        seed: int = 0,
        by_class: bool = False,
    ):
        self.projection = check_count("projection", projection, or_none=True)
        default = 0.1 if projection else 0.01
        self.ridge = default if ridge is None else check_number("ridge", ridge, above=0)
        self.normalize = check_choice("normalize", normalize, (True, False))
        self.seed = int(check_number("seed", seed, least=0))
        mapping = RandomProjection(sizes.features, projection, normalize, self.seed) if projection else None
        super().__init__(sizes, classes, by_class=by_class, mapping=mapping)
        self.register_buffer("scale", torch.ones(()))
        self.title = "random projection + ridge" if projection else "ridge"

    def check_classes(self, classes):
        if self.projection is not None and classes > self.projection:
            raise ValueError(
                f"projection is {self.projection}, but there are {classes} classes, which so few numbers cannot "
                "tell apart. Set it to some multiple of the number of classes, for instance 2000."
            )

    def solve(self, sums: Sums):
        gram, width = sums.moment, self.width
        least = torch.finfo(gram.dtype).tiny ** 0.5
        lambda_ = (self.ridge * gram.diagonal().mean()).clamp_min(least)
        eye = torch.eye(width, dtype=gram.dtype, device=gram.device)
        weight = solve_positive(gram + lambda_ * eye, sums.totals.T).T  # eq. 2
        residuals = sums.images - 2 * (weight * sums.totals).sum() + (weight @ gram * weight).sum()
        variance = residuals / max(sums.images * int((sums.counts > 0).sum()), 1)  # eq. 3
        self.scale = (1 / variance.clamp_min(1e-6)).to(self.scale)
        return weight * self.scale.to(weight), torch.zeros_like(sums.counts), None

    def _map_settings(self):
        return (*super()._map_settings(), self.projection, self.normalize, self.seed)
