"""Which differences between methods are more than noise: paired over the seeds, corrected for many comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Difference:
    """What a method has over another one on the same seeds.

    Attributes:
        mean: mean of the differences.
        deviation: their sample standard deviation (n - 1); NaN for one seed.
        seeds: how many pairs there are.
        p: two-sided p value of the paired t test; NaN where there is none.
    """

    mean: float
    deviation: float
    seeds: int
    p: float


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Difference:
    """The paired t test (Student 1908): t = mean / (deviation / sqrt(n)) with n - 1 degrees of freedom.

    Args:
        values, others: one number for each seed, of the same seeds in the same order.

    Raises:
        ValueError: no values, or not as many of both.

    Example:
        >>> paired_difference([0.52, 0.55, 0.53], [0.50, 0.52, 0.50]).p < 0.05
        True
    """
    if not values or len(values) != len(others):
        raise ValueError(
            f"There are {len(values)} values and {len(others)} of the other method, but pairs are needed. Give one of "
            "both for each seed."
        )
    differences = [value - other for value, other in zip(values, others, strict=True)]
    mean, count = fmean(differences), len(differences)
    if count < 2:
        return Difference(mean, math.nan, count, math.nan)
    deviation = stdev(differences)
    if deviation <= 1e-12:  # the same in every seed: without a difference nothing is to be told, with one everything
        return Difference(mean, deviation, count, 0.0 if abs(mean) > 1e-12 else 1.0)
    from scipy.stats import t

    statistic = mean / (deviation / math.sqrt(count))
    return Difference(mean, deviation, count, float(2 * t.sf(abs(statistic), count - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): p_(k) times (m - k + 1), and never below a smaller one's.

    NaN stays NaN and does not count.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, so_far = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(known):
        so_far = max(so_far, min(1.0, p * (len(known) - rank)))
        corrected[place] = so_far
    return corrected
