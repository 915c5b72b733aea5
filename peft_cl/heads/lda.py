"""Linear discriminant analysis."""

from __future__ import annotations

from typing import Literal

import torch

from .checks import check_choice, check_count, check_number
from .head import Sizes, register_head
from .maps import FourierFeatures
from .solved import SolvedHead
from .sums import Sums, solve_positive


#: Of the variance of all images: below it the variance within classes counts for nothing (one image in each class).
LEAST_VARIANCE = 1e-6
#: Of the second moment: a difference below it is rounding.
ROUNDING = 1e-12


@register_head("lda")
class LDAHead(SolvedHead):
    """Gaussian classes with one covariance: the logits are log-likelihoods, up to what all classes share.

    With the class means mu_c, the mean m of all images and the shrunk covariance S within classes,

        (1)  S = (G - sum_c n_c mu_c mu_c^T) / N
        (2)  S <- (1 - s) S + s tr(S) / M I
        (3)  w_c = S^-1 (mu_c - m),   b_c = -1/2 (mu_c - m)^T w_c [+ log n_c / N],   logit_c = w_c (h - m) + b_c.

    Without m in it, (3) is the usual form; it is subtracted so that no digits are lost where features lie far from 0.
    The result is that of scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)`. In continual
    learning: Hayes and Kanan 2020 (Deep SLDA, arXiv 1909.01520).

    Args:
        shrinkage: s, from 0 (the covariance as it is) to 1 (a multiple of the identity, which is nearest class mean).
            The default was chosen on held back training images (`benchmarks/heads.py --holdout 0.2`).
        priors: `"equal"`, or `"empirical"` for the classes' shares of the images.
        fourier: M cosines of a random Gaussian kernel beside the features (`FourierFeatures`, KLDA), for classes that
            no plane divides; None: the features as they are.
        gamma, seed: of `FourierFeatures`.
        by_class: as in `SolvedHead`.
    """

    title = "LDA"

    def __init__(
        self,
        sizes: Sizes,
        classes: int,
        *,
        shrinkage: float = 0.01,
        priors: Literal["equal", "empirical"] = "equal",
        fourier: int | None = None,
        gamma: float = 0.75,
        seed: int = 0,
        by_class: bool = False,
    ):
        self.shrinkage = check_number("shrinkage", shrinkage, least=0, most=1)
        self.priors = check_choice("priors", priors, ("equal", "empirical"))
        self.fourier = check_count("fourier", fourier, or_none=True)
        self.gamma = check_number("gamma", gamma, above=0)
        self.seed = int(check_number("seed", seed, least=0))
        mapping = FourierFeatures(sizes.features, fourier, gamma, self.seed) if fourier else None
        super().__init__(sizes, classes, by_class=by_class, mapping=mapping)
        self.title = "kernel LDA" if fourier else "LDA"

    def _map_settings(self):
        return (*super()._map_settings(), self.fourier, self.gamma, self.seed)

    def solve(self, sums: Sums):
        mean = sums.mean
        offsets = (sums.means - mean) * (sums.counts > 0)[:, None]
        weight = solve_positive(shrunk_covariance(sums, self.shrinkage), offsets.T).T  # eq. 3
        bias = -(offsets * weight).sum(-1) / 2  # eq. 3
        if self.priors == "empirical":
            bias = bias + (sums.counts.clamp_min(1) / max(sums.images, 1)).log()
        return weight, bias, mean


def shrunk_covariance(sums: Sums, shrinkage: float) -> torch.Tensor:
    """The covariance within classes (M, M), shrunk to a multiple of the identity (eq. 1 and 2)."""
    images, eye = max(sums.images, 1.0), torch.eye(len(sums.mean), dtype=torch.float64, device=sums.counts.device)
    covariance = sums.within() / images  # eq. 1
    variance, second = covariance.diagonal().mean(), sums.moment.diagonal().mean() / images
    around_mean = second - sums.mean.square().mean()
    rounding = ROUNDING * second + torch.finfo(torch.float64).tiny ** 0.5
    if variance <= torch.maximum(LEAST_VARIANCE * around_mean, rounding):
        # As good as one image in each class, or equal images: nothing is known of how they spread.
        return (around_mean if around_mean > rounding else second + rounding) * eye
    return (1 - shrinkage) * covariance + shrinkage * variance * eye  # eq. 2
