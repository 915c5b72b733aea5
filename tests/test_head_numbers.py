"""Heads on numbers that break less careful code: logits stay finite, and nothing is lost far from zero."""

from __future__ import annotations

import math

import pytest
import torch
from test_heads import CLASSES, OBSERVING, SOLVED, WIDTH, data, logits, taught


CASES = {
    "one image a class": lambda: (torch.randn(CLASSES, WIDTH), torch.arange(CLASSES)),
    "identical images": lambda: (torch.ones(30, WIDTH), torch.arange(30) % CLASSES),
    "a constant feature": lambda: (torch.randn(60, WIDTH) * (torch.arange(WIDTH) != 3), torch.arange(60) % CLASSES),
    "more classes than images": lambda: (torch.randn(3, WIDTH), torch.tensor([0, 4, 6])),
    "features of 1e4": lambda: (1e4 + 100 * torch.randn(80, WIDTH), torch.arange(80) % CLASSES),
    "an empty class": lambda: (torch.randn(60, WIDTH), torch.arange(60) % (CLASSES - 1)),
    "float16": lambda: (torch.randn(60, WIDTH).half(), torch.arange(60) % CLASSES),
    "all zero": lambda: (torch.zeros(30, WIDTH), torch.arange(30) % CLASSES),
    "one image": lambda: (torch.randn(1, WIDTH), torch.tensor([2])),
    "no image": lambda: (torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64)),
    "tiny numbers": lambda: (1e-20 * torch.randn(60, WIDTH), torch.arange(60) % CLASSES),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", OBSERVING)
def test_logits_are_finite(form, case):
    torch.manual_seed(0)
    features, labels = CASES[case]()
    head = taught(form, features, labels)
    found = logits(head, torch.cat([features.float(), torch.randn(5, WIDTH)]))
    assert found.shape[-1] == CLASSES and found.isfinite().all()
    if not form.startswith(("aligned", "fusion")) and len(labels):
        seen = labels.unique().tolist()
        assert set(found.argmax(-1).tolist()) <= set(seen)  # never a class that it has no image of


@pytest.mark.parametrize("form", SOLVED)
def test_far_from_zero_nothing_is_lost(form):
    """Float32 sums would leave two digits of these features."""
    features, labels = data(600)
    shifted = features + 1e4
    found, expected = (logits(taught(form, each, labels), each).argmax(-1) for each in (shifted, features))
    if form.startswith(("lda", "ncm")) and form != "ncm-cosine":  # the others are no functions of differences
        assert (found == expected).float().mean() > 0.98


def test_features_that_are_not_finite_are_left_out_and_told():
    features, labels = data()
    broken = features.clone()
    broken[5, 3] = math.inf
    with pytest.warns(UserWarning, match="1 of 300 images have features that are not finite.*bfloat16 or float32"):
        head = taught("lda", broken, labels, batch=300)
    rest = torch.arange(300) != 5
    torch.testing.assert_close(
        logits(head, features), logits(taught("lda", features[rest], labels[rest], batch=300), features)
    )


def test_float16_features_give_the_rows_of_float32():
    features, labels = data()
    half, single = (taught("lda", each, labels) for each in (features.half(), features.half().float()))
    torch.testing.assert_close(half.weight, single.weight, rtol=0, atol=0)
