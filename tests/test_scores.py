"""Metrics of scores that are ready to be given to a trainer: they are those of scikit-learn."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import sklearn.metrics
from own_metrics_cases import accuracy
from transformers import EvalPrediction

from peft_cl.metrics import confusion_matrix, f1, top_k_accuracy
from peft_cl.metrics.scores import confusion_counts, mean_f1, share_in_top_k


def example(classes: int = 7, count: int = 200, seed: int = 0) -> EvalPrediction:
    """Scores without ties; the last class occurs neither as label nor, its scores being low, as prediction."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(count, classes)).astype(np.float32)
    scores[:, -1] -= 100
    return EvalPrediction(predictions=scores, label_ids=rng.integers(0, classes - 1, count))


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_top_k_is_that_of_scikit_learn(k):
    found = example()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k of all classes says nothing, it warns
        expected = sklearn.metrics.top_k_accuracy_score(
            found.label_ids, found.predictions, k=k, labels=np.arange(found.predictions.shape[1])
        )
    assert top_k_accuracy(k)(found) == {f"top_{k}_accuracy": pytest.approx(expected)}


@pytest.mark.parametrize("average", ["macro", "weighted"])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_f1_is_that_of_scikit_learn(average, classes):
    found = example(classes + 1)
    predicted = found.predictions.argmax(-1)
    predicted[found.label_ids == 0] = 1  # a class that is never predicted, with a mean over the others too
    expected = sklearn.metrics.f1_score(found.label_ids, predicted, average=average, zero_division=0)
    assert mean_f1(predicted, found.label_ids, average) == pytest.approx(expected)
    whole = sklearn.metrics.f1_score(found.label_ids, found.predictions.argmax(-1), average=average)
    assert f1(average)(found) == {f"{average}_f1": pytest.approx(whole)}


def test_the_confusion_matrix_is_that_of_scikit_learn():
    found = example()
    counts = confusion_matrix()(found)["confusion_matrix"]
    expected = sklearn.metrics.confusion_matrix(found.label_ids, found.predictions.argmax(-1), labels=np.arange(7))
    assert counts == expected.tolist() and all(type(value) is int for row in counts for value in row)


def test_by_hand():
    # Classes 0, 1, 2 of 4 images; predicted 0, 0, 2, 1: TP 1, 0, 1; FP 1, 1, 0; FN 0, 1, 1.
    assert mean_f1([0, 0, 2, 1], [0, 1, 2, 2], "macro") == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert mean_f1([0, 0, 2, 1], [0, 1, 2, 2], "weighted") == pytest.approx((2 / 3 + 0 + 2 * 2 / 3) / 4)
    assert confusion_counts([0, 0, 2, 1], [0, 1, 2, 2], 3).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]


def test_of_equal_scores_the_first_comes_first_as_in_the_accuracy():
    scores, labels = np.zeros((3, 3)), np.arange(3)
    assert [share_in_top_k(scores, labels, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert share_in_top_k(scores, labels, 1) == accuracy(EvalPrediction(scores, labels))
    assert share_in_top_k(np.full((2, 2), np.nan), [0, 1], 2) == 0.0  # a model that broke has no rank
    masked = np.array([[0.2, 0.1, -np.inf, -np.inf]])  # the task is known
    assert share_in_top_k(masked, [1], 1) == 0.0 and share_in_top_k(masked, [1], 5) == 1.0


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "5", math.nan])
def test_a_k_that_is_none_is_refused(k):
    with pytest.raises(ValueError, match="k is .*, but must be a whole number of at least 1. Give one such as 5"):
        top_k_accuracy(k)


@pytest.mark.parametrize("average", ["micro", None, 1])
def test_an_average_that_is_none_is_refused(average):
    with pytest.raises(ValueError, match="average is .*, but must be 'macro' or 'weighted'"):
        f1(average)
