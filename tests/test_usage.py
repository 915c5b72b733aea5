"""Prompt usage against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peft_cl.metrics import usage_entropy, usage_overlap, usage_shares


NAN = math.nan


def test_shares_are_of_each_task_alone():
    # 4 choices for the first task, 10 for the second
    np.testing.assert_allclose(usage_shares([[3, 1, 0], [1, 4, 5]]), [[0.75, 0.25, 0], [0.1, 0.4, 0.5]])


def test_entropy_in_bits():
    # equal shares of 4 rows: log2(4); of two rows: 1; one row: 0; (1/2, 1/4, 1/4): 1/2 * 1 + 2 * 1/4 * 2
    counts = [[7, 7, 7, 7], [0, 2, 2, 0], [0, 0, 9, 0], [4, 2, 2, 0]]
    np.testing.assert_allclose(usage_entropy(counts), [2, 1, 0, 1.5], atol=1e-15)
    assert not np.signbit(usage_entropy([[5, 0]])).any()  # "-0.0" would be printed


def test_entropy_of_a_pool_of_one_row_is_zero():
    assert usage_entropy([[3], [8]]).tolist() == [0, 0]


def test_overlap_by_hand():
    # shares (3/4, 1/4, 0), (1/4, 3/4, 0), (0, 0, 1): the first two share 1/4 + 1/4
    overlap = usage_overlap([[3, 1, 0], [1, 3, 0], [0, 0, 4]])
    np.testing.assert_allclose(overlap, [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])


def test_measures_do_not_depend_on_the_number_of_images():
    counts = np.random.default_rng(0).integers(0, 9, (4, 6)) + np.eye(4, 6, dtype=int)
    images = np.array([[1], [2], [10], [500]])
    for measure in (usage_shares, usage_entropy, usage_overlap):
        np.testing.assert_allclose(measure(counts), measure(counts * images))


@pytest.mark.parametrize("measure", [usage_shares, usage_entropy, usage_overlap])
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[1, 2], [3, -1]], "finite numbers from 0, got -1.0"),
        ([[1, NAN]], "finite numbers from 0, got nan"),
        ([[1, math.inf]], "finite numbers from 0, got inf"),
        ([[1, 2], [0, 0]], "No row was chosen for task 1"),
        ([1, 2], r"the shape \(2,\), but need \(tasks, rows\)"),
        ([[[1]]], r"the shape \(1, 1, 1\)"),
        ([], r"the shape \(0,\)"),
        ([[], []], r"the shape \(2, 0\)"),
        ([[1, 2], [3]], "as many for each task"),
        ([["often"]], "must be numbers"),
    ],
)
def test_what_are_no_counts_is_refused(measure, counts, message):
    with pytest.raises(ValueError, match=message):
        measure(counts)
