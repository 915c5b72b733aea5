"""Classes as Gaussians with one covariance, made of the sums that a head keeps, and distances from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..heads import FusionHead, Head, SolvedHead, Sums
from ..heads.composite import CompositeHead
from ..heads.lda import shrunk_covariance
from ..heads.sums import cholesky


#: Shrinkage of the covariance for a head that has none of its own (ridge): what "lda" has.
SHRINKAGE = 0.01


class ClassGaussians:
    """Gaussian classes that share a covariance S, in whitened coordinates (Lee et al. 2018, arXiv 1807.03888, eq. 1).

    Args:
        sums: counts, class sums and second moment of the mapped features h in R^M of all images seen.
        shrinkage: of S towards a multiple of the identity, as the head "lda" has it.
    """

    def __init__(self, sums: Sums, shrinkage: float = SHRINKAGE):
        self.factor = cholesky(shrunk_covariance(sums, shrinkage))  # S = L L^T
        self.center = sums.mean
        self.seen = sums.counts > 0
        self.means = self._whitened(sums.means)

    def distances(self, mapped: torch.Tensor) -> torch.Tensor:
        """Squared Mahalanobis distances (h - mu_c)^T S^-1 (h - mu_c), float64: (B, M) -> (B, C); infinite for a class
        without images."""
        found = torch.cdist(self._whitened(mapped.to(self.factor)), self.means).square()
        return found.masked_fill(~self.seen, torch.inf)

    def _whitened(self, points: torch.Tensor) -> torch.Tensor:
        """L^-1 (h - m): there the Mahalanobis distance is the Euclidean one."""
        return torch.linalg.solve_triangular(self.factor, (points - self.center).T, upper=False).T


@dataclass(frozen=True)
class GaussianPart:
    """The Gaussians of a head, or of one of the heads that it is made of.

    Attributes:
        head: the part that keeps the sums, which maps features to h.
        gaussians: those of its sums.
        of_query: whether it reads the frozen model's features in the place of the prompted ones.
        weight: what its distances are multiplied by.
    """

    head: SolvedHead
    gaussians: ClassGaussians
    of_query: bool = False
    weight: float = 1.0

    def distances(self, features: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
        """(B, F) features and (B, Q) query -> (B, C)."""
        read = query if self.of_query else features
        return self.weight * self.gaussians.distances(self.head.map(read.to(self.head.weight.dtype)))


def gaussians_of(head: Head, of_query: bool = False, weight: float = 1.0) -> list[GaussianPart]:
    """The Gaussians in a head, one for each part that keeps a second moment; none where no part does.

    A fusion has one for the prompted and one for the frozen features. Their distances add up, weighted as their logits
    are.
    """
    if isinstance(head, FusionHead):
        of_features = gaussians_of(head.prompted)
        return of_features + (gaussians_of(head.query, True, head.weight) if head.weight else [])
    if isinstance(head, CompositeHead):
        return [found for part in head.parts.values() for found in gaussians_of(part, of_query, weight)]
    sums = getattr(head, "sums", None)
    if not isinstance(head, SolvedHead) or not head.keeps_gram or sums is None or not sums.images:
        return []
    return [GaussianPart(head, ClassGaussians(sums, getattr(head, "shrinkage", SHRINKAGE)), of_query, weight)]
