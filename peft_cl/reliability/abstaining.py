"""Abstaining: a model predicts only where it is sure enough, which costs coverage and gains accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


#: Shares of the images at which tables show the accuracy.
COVERAGES = (1.0, 0.9, 0.75, 0.5)


class Kept(NamedTuple):
    """What is left of the predictions below a threshold of which a model abstains.

    Attributes:
        coverage: Share of the images that it predicts, from 0 to 1.
        accuracy: Share of these that are right; `None` where it predicts none.
    """

    coverage: float
    accuracy: float | None


def kept_above(confidence: ArrayLike, correct: ArrayLike, threshold: float) -> Kept:
    """Coverage and accuracy of a model that abstains where its confidence is below a threshold.

    Args:
        confidence: The probability of each prediction, (N,).
        correct: Whether it is right, (N,).
        threshold: The least confidence of a prediction, which is kept itself.

    Raises:
        ValueError: No predictions, not as many of both, or confidences that are not numbers.

    Example:
        >>> kept_above([0.9, 0.6, 0.4, 0.3], [True, True, False, False], 0.5)
        Kept(coverage=0.5, accuracy=1.0)
    """
    confidence, correct = _checked(confidence, correct)
    kept = confidence >= threshold
    return Kept(float(kept.mean()), float(correct[kept].mean()) if kept.any() else None)


@dataclass(frozen=True)
class RiskCoverage:
    """The risk-coverage curve (El-Yaniv and Wiener 2010, JMLR 11, section 2; for networks: Geifman and El-Yaniv 2017,
    arXiv 1705.08500): a point for each confidence that occurs, the highest first.

    Attributes:
        thresholds: The confidences, (points,), falling.
        coverage: Share of the images of at least that confidence, (points,), rising to 1.
        risk: Share of these that are wrong, (points,).
    """

    thresholds: np.ndarray
    coverage: np.ndarray
    risk: np.ndarray

    @property
    def area(self) -> float:
        """The mean risk over all coverages (AURC): 0 is a model that is never wrong. Each point stands for the
        coverages from the one before to its own."""
        return float(np.diff(self.coverage, prepend=0.0) @ self.risk)


def risk_coverage_curve(confidence: ArrayLike, correct: ArrayLike) -> RiskCoverage:
    """The risk of a model that abstains, at each coverage that a threshold can give.

    Args:
        confidence: The probability of each prediction, (N,).
        correct: Whether it is right, (N,).

    Raises:
        ValueError: As `kept_above`.

    Example:
        >>> curve = risk_coverage_curve([0.9, 0.6, 0.6, 0.3], [True, True, False, False])
        >>> curve.coverage, curve.risk.round(2)
        (array([0.25, 0.75, 1.  ]), array([0.  , 0.33, 0.5 ]))
    """
    confidence, correct = _checked(confidence, correct)
    # Equal confidences are kept or left together.
    values, place, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong = np.bincount(place, weights=~correct, minlength=len(values))
    images = counts.cumsum()
    return RiskCoverage(-values, images / len(confidence), wrong.cumsum() / images)


def threshold_for_accuracy(confidence: ArrayLike, correct: ArrayLike, accuracy: float) -> float:
    """The lowest threshold at which the predictions that are left have the wanted accuracy: of all thresholds that
    reach it, the one of the largest coverage.

    Choose it on images that the model was not trained on, and that are not the test images either: on the images that
    it was chosen on, its accuracy is a little better than on others.

    Args:
        confidence: The probability of each prediction, (N,).
        correct: Whether it is right, (N,).
        accuracy: The wanted accuracy, above 0 and at most 1.

    Raises:
        ValueError: As `kept_above`; another accuracy, or one that no threshold reaches.

    Example:
        >>> threshold_for_accuracy([0.9, 0.6, 0.4, 0.3], [True, True, True, False], 0.9)
        0.4
    """
    if not 0 < accuracy <= 1:
        raise ValueError(f"accuracy is {accuracy}, but must be above 0 and at most 1, such as 0.95.")
    curve = risk_coverage_curve(confidence, correct)
    # What is exact in decimals, such as 0.9 of 10 images, is not in binary.
    reached = np.flatnonzero(1 - curve.risk >= accuracy - 1e-12)
    if not len(reached):
        best = int(curve.risk.argmin())
        raise ValueError(
            f"accuracy is {accuracy}, but no threshold reaches it on these images: the best is "
            f"{1 - curve.risk[best]:.4f}, at a threshold of {curve.thresholds[best]:.4f}, which leaves "
            f"{100 * curve.coverage[best]:.1f} % of them. Give no more than that."
        )
    return float(curve.thresholds[reached[-1]])


def accuracy_at_coverage(confidence: ArrayLike, correct: ArrayLike, coverage: float) -> float:
    """Accuracy on the share of the images that the model is surest of.

    Of images of equal confidence, some of which are in the share, each counts as much as another: the result does not
    depend on their order.

    Args:
        confidence: The probability of each prediction, (N,).
        correct: Whether it is right, (N,).
        coverage: The share, above 0 and at most 1; of N images, this times N rounded up.

    Raises:
        ValueError: As `kept_above`; or another coverage.

    Example:
        >>> accuracy_at_coverage([0.9, 0.6, 0.6, 0.3], [True, True, False, False], 0.5)
        0.75
    """
    confidence, correct = _checked(confidence, correct)
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage is {coverage}, but must be above 0 and at most 1, such as 0.9.")
    values, place = np.unique(-confidence, return_inverse=True)
    right = np.bincount(place, weights=correct, minlength=len(values)) / np.bincount(place, minlength=len(values))
    # Less than one image's share is rounding: 0.9 of 10 images are 9.
    count = int(np.ceil(coverage * len(confidence) - 1e-9))
    return float(right[np.sort(place)][:count].mean())


def _checked(confidence: ArrayLike, correct: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct)
    if confidence.ndim != 1 or not confidence.size or confidence.shape != correct.shape:
        raise ValueError(
            f"confidence has the shape {confidence.shape} and correct {correct.shape}, but both must be one value for "
            "each prediction, (N,). Give as many of each."
        )
    if not np.isfinite(confidence).all():
        raise ValueError(
            f"confidence has {int((~np.isfinite(confidence)).sum())} values that are not finite. Leave these images "
            "out; a backbone in float16 overflows, load it in bfloat16 or float32."
        )
    if not np.isin(correct, (0, 1)).all():
        raise ValueError("correct must be True or False for each prediction. Give (predicted == truth).")
    return confidence, correct.astype(bool)
