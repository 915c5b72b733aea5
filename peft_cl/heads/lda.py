"""Linear discriminant analysis."""

from __future__ import annotations

from typing import Literal

import torch

from .checks import check_choice, check_count, check_number
from .head import Sizes, register_head
from .maps import FourierFeatures
from .solved import SolvedHead
from .sums import Sums, cholesky


#: Of the variance of all images: below it the variance within classes counts for nothing (one image in each class).
LEAST_VARIANCE = 1e-6
#: Vectors by which a trace is estimated, to some percent.
PROBES = 64
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
        few_images: shrink the means of classes that have fewer images than most (`trust_in_means`). Without it a class
            of five images beside classes of hundreds is never the answer: the noise of its mean lies in all M
            directions, and takes it far from every image. Where counts are equal it changes nothing.
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
        few_images: bool = False,
        by_class: bool = False,
    ):
        self.few_images = check_choice("few_images", few_images, (True, False))
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

    def expect_few(self, options):
        self.few_images = True
        return {**options, "few_images": True}

    def solve(self, sums: Sums):
        mean = sums.mean
        offsets = (sums.means - mean) * (sums.counts > 0)[:, None]
        factor = cholesky(shrunk_covariance(sums, self.shrinkage))
        weight = torch.cholesky_solve(offsets.T, factor).T  # eq. 3
        if self.few_images:
            trust = trust_in_means(sums.counts, (offsets * weight).sum(-1), factor, self.shrinkage)[:, None]
            offsets, weight = trust * offsets, trust * weight
        bias = -(offsets * weight).sum(-1) / 2  # eq. 3
        if self.priors == "empirical":
            bias = bias + (sums.counts.clamp_min(1) / max(sums.images, 1)).log()
        return weight, bias, mean


def shrunk_covariance(sums: Sums, shrinkage: float) -> torch.Tensor:
    """The covariance within classes (M, M), shrunk to a multiple of the identity (eq. 1 and 2)."""
    images = max(sums.images, 1.0)
    covariance = sums.within().div_(images)  # eq. 1; in place, as it may be larger than all else
    variance, second = covariance.diagonal().mean(), sums.moment.diagonal().mean() / images
    around_mean = second - sums.mean.square().mean()
    rounding = ROUNDING * second + torch.finfo(torch.float64).tiny ** 0.5
    if variance <= torch.maximum(LEAST_VARIANCE * around_mean, rounding):
        # As good as one image in each class, or equal images: nothing is known of how they spread.
        return (around_mean if around_mean > rounding else second + rounding) * torch.eye(len(covariance)).to(
            covariance
        )
    covariance.mul_(1 - shrinkage).diagonal().add_(shrinkage * variance)  # eq. 2
    return covariance


def trust_in_means(
    counts: torch.Tensor, lengths: torch.Tensor, factor: torch.Tensor, shrinkage: float
) -> torch.Tensor:
    """How much of its offset from the overall mean a class keeps, (C,): all, if it has as many images as most.

    The mean of n_c images has the covariance Sigma / n_c, so that its length d_c = (mu_c - m)^T S^-1 (mu_c - m) is too
    large by T / n_c on average. Beside classes with n images that is a matter of the difference,

        (4)  k_c = D / (D + T max(0, 1 / n_c - 1 / n)),   T = tr(S^-1 Sigma),

    for the median n of the counts and the mean length D of the classes that have as many: the mean that is likeliest
    if classes lie about D from the overall mean (Efron and Morris 1975, the estimator of James and Stein).

    Args:
        counts: n_c, (C,).
        lengths: d_c, (C,).
        factor: the Cholesky factor of S, (M, M).
        shrinkage: s of eq. 2, by which Sigma is known from S.
    """
    seen = counts > 0
    usual = counts[seen].median() if seen.any() else counts.new_ones(())
    excess = (1 / counts.clamp_min(1) - 1 / usual).clamp_min(0) * seen
    if not excess.any():
        return torch.ones_like(counts)
    width = len(factor)
    # tr(S^-1), as the mean of z^T S^-1 z over vectors z of random signs (Hutchinson), at a hundredth of the work.
    signs = torch.randint(0, 2, (width, PROBES), generator=torch.Generator().manual_seed(0)).to(factor) * 2 - 1
    inverse = torch.linalg.solve_triangular(factor, signs, upper=False).square().sum() / PROBES
    variance = factor.square().sum() / width  # tr(S) / M, which shrinking leaves as it is
    spread = (width - shrinkage * variance * inverse) / (1 - shrinkage) if shrinkage < 1 else counts.new_tensor(width)
    distance = lengths[counts >= usual].mean()
    return distance / (distance + spread.clamp_min(0) * excess).clamp_min(torch.finfo(factor.dtype).tiny)
