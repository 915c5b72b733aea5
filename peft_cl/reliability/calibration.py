"""Temperature scaling, and how far probabilities are from accuracies (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax

from ..disk import read_json, replacing
from ..metrics.record_checks import check_calibration
from ..text import brief


#: A temperature is kept within these: where all images are right, the likelihood has no maximum.
LOWEST, HIGHEST = 0.05, 100.0
BINS = 15
#: What `peft-cl calibrate` writes beside the adapter.
CALIBRATION_FILE = "calibration.json"
#: What a row of probabilities may differ from 1 in sum: those of bfloat16 have three digits.
ROUNDING = 0.02


def fit_temperature(logits: Any, labels: Any) -> float:
    """Find the temperature T under which the labels are likeliest, if logits are divided by T (Guo et al., eq. 9).

    The mean negative log-likelihood is convex in 1/T, so it has one minimum, where its slope is 0. T > 1 makes
    probabilities less sure, T < 1 surer; the order of the classes stays.

    Args:
        logits: (images, classes), an array or a tensor, of images that were not learnt. -inf marks a class that is out
            of the question for an image.
        labels: (images,), the class of each image, whole numbers from 0.

    Returns:
        The temperature, from 0.05 to 100: an end of the range where the minimum lies beyond it. 1 where every
        temperature is as good, as with a single class.

    Raises:
        ValueError: no images, shapes that do not fit, labels of no class or of one that is out of the question, or
            logits that are NaN or +inf.

    Example:
        >>> round(fit_temperature([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]], [0, 0, 0, 1]), 4)
        1.8205
    """
    logits, labels = checked_logits(logits, labels)
    scores, right = np.where(np.isneginf(logits), 0.0, logits), _of_labels(logits, labels)

    def slope(inverse: float) -> float:
        """Of the mean negative log-likelihood in 1/T: the expected logit under the probabilities less the label's."""
        return float(((softmax(inverse * logits, axis=-1) * scores).sum(-1) - right).mean())

    if slope(1.0) == 0:
        return 1.0
    if slope(1 / HIGHEST) >= 0:
        return HIGHEST
    if slope(1 / LOWEST) <= 0:
        return LOWEST
    return 1 / brentq(slope, 1 / HIGHEST, 1 / LOWEST, xtol=1e-12)


def negative_log_likelihood(logits: Any, labels: Any, temperature: float = 1.0) -> float:
    """Returns the mean negative log-likelihood of the labels, in nats, with logits divided by `temperature`.

    Args:
        logits, labels: as `fit_temperature` has them.
        temperature: above 0.

    Raises:
        ValueError: as `fit_temperature`; a temperature that is not above 0.

    Example:
        >>> round(negative_log_likelihood([[0.0, 0.0]], [1]), 4)  # log 2
        0.6931
    """
    logits, labels = checked_logits(logits, labels)
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature is {brief(temperature)}, but must be a number above 0.")
    logits = logits / temperature
    return float((logsumexp(logits, axis=-1) - _of_labels(logits, labels)).mean())


@dataclass(frozen=True)
class ReliabilityBins:
    """Images by their confidence, the probability of the predicted class, in bins of equal width from 0 to 1.

    Attributes:
        confidence: Mean confidence of each bin, 0 to 1; `None` for a bin without images.
        accuracy: Share of each bin's images that are predicted right; `None` for a bin without images.
        count: Images of each bin.
    """

    confidence: list[float | None]
    accuracy: list[float | None]
    count: list[int]

    @property
    def error(self) -> float:
        """The expected calibration error: the mean of |accuracy - confidence| over the images (eq. 3)."""
        gaps = [
            count * abs(accuracy - confidence)
            for confidence, accuracy, count in zip(self.confidence, self.accuracy, self.count, strict=True)
            if count
        ]
        return float(sum(gaps) / sum(self.count))


def reliability_bins(probabilities: Any, labels: Any, bins: int = BINS) -> ReliabilityBins:
    """Sorts images into bins by their confidence: bin m of M holds those in ((m-1)/M, m/M].

    Args:
        probabilities: (images, classes), an array or a tensor, rows that sum to 1.
        labels: (images,), the class of each image, whole numbers from 0.
        bins: Number of bins, M.

    Raises:
        ValueError: no images, shapes that do not fit, labels of no class, rows that are no probabilities, or no bins.

    Example:
        >>> reliability_bins([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]], [0, 1, 1], bins=4).count
        [0, 0, 1, 2]
    """
    probabilities, labels = _checked_pair("probabilities", probabilities, labels)
    if not (probabilities >= 0).all() or (abs(probabilities.sum(-1) - 1) > ROUNDING).any():
        raise ValueError(
            "probabilities has rows that are negative or do not sum to 1, but must hold probabilities. Make them from "
            "logits by softmax over the last axis."
        )
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins is {brief(bins)}, but must be a whole number of at least 1.")
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    # Bounds as they are written, m/M: a product such as 0.2 * 15 is rounded to the wrong side.
    place = np.searchsorted(np.arange(1, bins) / bins, confidence, side="left")
    count = np.bincount(place, minlength=bins)

    def means(values: np.ndarray) -> list[float | None]:
        sums = np.bincount(place, weights=values, minlength=bins)
        return [float(total / images) if images else None for total, images in zip(sums, count, strict=True)]

    return ReliabilityBins(means(confidence), means(right), count.tolist())


def expected_calibration_error(probabilities: Any, labels: Any, bins: int = BINS) -> float:
    """Returns the expected calibration error, 0 to 1 (Guo et al., eq. 3): how far confidence and accuracy differ.

    Args:
        probabilities, labels, bins: as `reliability_bins` has them.

    Raises:
        ValueError: as `reliability_bins`.

    Example:
        >>> round(expected_calibration_error([[0.9, 0.1], [0.9, 0.1]], [0, 1]), 4)  # 90 % sure, 50 % right
        0.4
    """
    return reliability_bins(probabilities, labels, bins).error


@dataclass(frozen=True)
class CalibrationMeasures:
    """How good the probabilities of some images are.

    Attributes:
        nll: Mean negative log-likelihood of the labels, in nats.
        ece: Expected calibration error, 0 to 1.
        accuracy: Share of the images that are predicted right, 0 to 1.
        bins: Confidence, accuracy and count by confidence, what a reliability diagram shows.
    """

    nll: float
    ece: float
    accuracy: float
    bins: ReliabilityBins

    @classmethod
    def of(cls, logits: Any, labels: Any, temperature: float = 1.0, bins: int = BINS) -> CalibrationMeasures:
        """Measures logits (images, classes) divided by `temperature`, as `fit_temperature` takes them."""
        nll = negative_log_likelihood(logits, labels, temperature)
        logits, labels = checked_logits(logits, labels)
        found = reliability_bins(softmax(logits / temperature, axis=-1), labels, bins)
        return cls(nll, found.error, float((logits.argmax(-1) == labels).mean()), found)

    @property
    def images(self) -> int:
        """How many images were measured."""
        return sum(self.bins.count)


@dataclass(frozen=True)
class Calibration:
    """A temperature, and how good probabilities are without and with it.

    Attributes:
        temperature: What logits are divided by.
        before: At the temperature 1.
        after: On the same images, with a temperature.
        images: How many images `temperature` was fitted on. If that is more than were measured, `after` is of a
            temperature that was fitted on the other images; else of this one on the images that it was fitted on,
            which is a little better than on new images.

    Example:
        >>> calibration = Calibration.load("out/calibration.json")    # doctest: +SKIP
        >>> calibration.after.ece                                     # doctest: +SKIP
        0.021
    """

    temperature: float
    before: CalibrationMeasures
    after: CalibrationMeasures
    images: int

    @property
    def held_out(self) -> bool:
        """Whether `after` was measured on images that its temperature was not fitted on."""
        return self.after.images < self.images

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON knows."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Calibration:
        """Takes back what `to_dict` gave.

        Raises:
            ValueError: Something else; the message names it and the rule.
        """
        check_calibration("calibration", facts)
        before, after = (
            CalibrationMeasures(**{**facts[part], "bins": ReliabilityBins(**facts[part]["bins"])})
            for part in ("before", "after")
        )
        return cls(facts["temperature"], before, after, facts["images"])

    def save(self, path: str | Path) -> None:
        """Writes it as JSON; an older file is replaced at once or not at all."""
        with replacing(Path(path)) as aside:
            aside.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or holds something else.
        """
        return cls.from_dict(read_json(Path(path)))


def _array(values: Any) -> np.ndarray:
    """An array of what may be a tensor, on any device and of any format."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _checked_pair(name: str, values: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values (images, classes) in float64 and labels (images,) that fit them."""
    values, labels = _array(values), _array(labels)
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiu":
        raise ValueError(
            f"{name} has the shape {values.shape} and dtype {values.dtype}, but must be numbers (images, classes), at "
            "least one of each."
        )
    if labels.shape != (len(values),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels has the shape {labels.shape} and dtype {labels.dtype}, but must be whole numbers, one for "
            f"each of the {len(values)} images, ({len(values)},)."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= values.shape[1]:
        raise ValueError(
            f"labels reaches from {low} to {high}, but {name} has the classes 0 to {values.shape[1] - 1}. Give rows "
            "of the head, in the order of `classes` in the adapter's configuration."
        )
    return values.astype(np.float64), labels


def checked_logits(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits (images, classes) in float64 and labels (images,), refused as `fit_temperature` says."""
    logits, labels = _checked_pair("logits", logits, labels)
    wrong = np.flatnonzero((np.isnan(logits) | np.isposinf(logits)).any(-1))
    if wrong.size:
        raise ValueError(
            f"logits has NaN or +inf for {wrong.size} images (the first is image {wrong[0]}), but must be finite, or "
            "-inf for classes that are out of the question. Leave these images out, or train with a lower rate."
        )
    masked = np.flatnonzero(np.isneginf(_of_labels(logits, labels)))
    if masked.size:
        raise ValueError(
            f"labels has classes whose logit is -inf for {masked.size} images (the first is image {masked[0]}), but "
            "the class of an image must be in question. Give the task that the image is of, or leave it out."
        )
    return logits, labels


def _of_labels(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each image's logit of its own class, (images,)."""
    return np.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
