"""Sums over pairs of a pool's rows, of which those between past rows are summed once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .similarity import cosine_sum, gram_sum, pair_sum, product_sum, signed_sum


#: What rows add, beside past ones, to the sum over pairs that a form of orthogonality is.
FORMS = {"gram": gram_sum, "pairwise": pair_sum, "products": product_sum, "signed": signed_sum}
DIVERSITY = cosine_sum


class PairSums:
    """The sums of one pool, by the name of the term and of its rows. Those of past rows are constant within a task:
    there are as many as the square of their number.
    """

    def __init__(self):
        self.past: dict[tuple[str, str], float] = {}

    def total(
        self,
        key: tuple[str, str],
        pairs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        current: torch.Tensor,
        past: torch.Tensor,
        step: int,
    ) -> torch.Tensor:
        """Over all pairs of past and current rows; only the current ones get a gradient.

        Args:
            key: the term and the name of its rows.
            pairs: one of `FORMS`, or `DIVERSITY`.
            current: (sets, k, F).
            past: (sets, n, F).
            step: how many past rows are taken at a time, k of a task before.
        """
        if key not in self.past:
            parts = [(past[:, first : first + step], past[:, :first]) for first in range(0, past.shape[1], step)]
            self.past[key] = sum(pairs(rows, before.to(rows)).item() for rows, before in parts)
        return pairs(current, past.to(current)) + self.past[key]

    def add(
        self,
        key: tuple[str, str],
        pairs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        current: torch.Tensor,
        past: torch.Tensor,
    ) -> None:
        """The current rows become past ones."""
        if key in self.past:
            self.past[key] += pairs(current.detach(), past.to(current)).item()
