"""Metrics of scores, ready to be given to a trainer as `compute_metrics`.

Each is made by a call that takes its settings, and is then a function of `transformers.EvalPrediction` (`predictions`:
scores (N, classes), `label_ids`: true classes (N,)) that returns its value by name, for any `transformers.Trainer` of
a classifier. Predicted is the class of the highest score, the first one of equals.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from transformers import EvalPrediction

AVERAGES = ("macro", "weighted")


def top_k_accuracy(k: int = 5) -> Callable[[EvalPrediction], dict[str, float]]:
    """Share of examples whose true class is among the `k` with the highest scores, as `top_<k>_accuracy`.

    With `k` classes or fewer it is 1. `top_k_accuracy(1)` is the accuracy.

    Args:
        k: A whole number of at least 1.

    Raises:
        ValueError: Another `k`.

    Example:
        >>> ContinualTrainer(model, args, scenario, processing_class=processor, compute_metrics=top_k_accuracy(5))
    """
    if not isinstance(k, Integral) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k is {k!r}, but must be a whole number of at least 1. Give one such as 5.")
    name = f"top_{k}_accuracy"
    return lambda prediction: {name: share_in_top_k(prediction.predictions, prediction.label_ids, k)}


def f1(average: str = "macro") -> Callable[[EvalPrediction], dict[str, float]]:
    """F1 score over classes, as `<average>_f1`: the harmonic mean of precision and recall, a mean over classes of it.

    The classes are those that occur, as label or as prediction, as in scikit-learn's `f1_score`: on the test images of
    one task, a class of another task that is predicted for one of them counts with 0 in the macro mean.

    Args:
        average: `"macro"`, in which each class counts alike, or `"weighted"`, by its number of examples. (The micro
            average of one label an example is the accuracy.)

    Raises:
        ValueError: Another average.

    Example:
        >>> ContinualTrainer(model, args, scenario, processing_class=processor, compute_metrics=f1("macro"))
    """
    if average not in AVERAGES:
        raise ValueError(f"average is {average!r}, but must be 'macro' or 'weighted'. Give one of them.")
    name = f"{average}_f1"
    return lambda prediction: {name: mean_f1(predicted_classes(prediction), prediction.label_ids, average)}


def confusion_matrix() -> Callable[[EvalPrediction], dict[str, list]]:
    """Numbers of examples by true class (row) and predicted class (column), as `confusion_matrix`.

    Rows and columns are the classes seen, in the order in which they were learnt (`scenario["class_order"]` of the
    record). The matrices of all tasks, which are of different rows, add up to that of all test images.

    Example:
        >>> ContinualTrainer(model, args, scenario, processing_class=processor, compute_metrics=confusion_matrix())
    """

    def measure(prediction: EvalPrediction) -> dict[str, list]:
        classes = np.shape(prediction.predictions)[1]
        counts = confusion_counts(predicted_classes(prediction), prediction.label_ids, classes)
        return {"confusion_matrix": counts.tolist()}

    return measure


def predicted_classes(prediction: EvalPrediction) -> np.ndarray:
    """(N,): the class of the highest score, the first one of equals."""
    return np.argmax(prediction.predictions, axis=-1)


def share_in_top_k(scores: Any, labels: Any, k: int) -> float:
    """Share of examples whose true class is among the `k` highest scores; of equals the first ones come first.

    Args:
        scores: (N, classes).
        labels: (N,).

    Example:
        >>> share_in_top_k([[0.5, 0.2, 0.3], [0.1, 0.2, 0.7]], [2, 0], k=2)
        0.5
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    # NaN is no rank: an example with one in its true class is a miss.
    before = ~(scores <= own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
    return float((before.sum(axis=1) < min(k, scores.shape[1])).mean())


def mean_f1(predicted: Any, labels: Any, average: str) -> float:
    """Mean over the classes that occur of 2 TP / (2 TP + FP + FN).

    Args:
        predicted, labels: (N,).
        average: `"macro"` or `"weighted"`.

    Example:
        >>> mean_f1([0, 0, 1], [0, 1, 1], "macro")
        0.6666666666666666
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    count = max(predicted.max(), labels.max()) + 1
    hits = np.bincount(labels[predicted == labels], minlength=count)
    of_class = np.bincount(labels, minlength=count)
    both = of_class + np.bincount(predicted, minlength=count)  # 2 TP + FP + FN
    occur = both > 0
    scores, weights = 2 * hits[occur] / both[occur], of_class[occur]
    return float(np.average(scores, weights=weights if average == "weighted" else None))


def confusion_counts(predicted: Any, labels: Any, classes: int) -> np.ndarray:
    """(classes, classes): numbers of examples by true class (row) and predicted class (column).

    Example:
        >>> confusion_counts([0, 0, 1], [0, 1, 1], 2)
        array([[1, 0],
               [1, 1]])
    """
    places = np.asarray(labels) * classes + np.asarray(predicted)
    return np.bincount(places, minlength=classes * classes).reshape(classes, classes)
