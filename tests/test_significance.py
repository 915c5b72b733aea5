"""Measures of runs, and which differences are more than noise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from peft_cl.commands.methods import METHODS
from peft_cl.metrics.measures import MEASURES, millions
from peft_cl.metrics.significance import holm, paired_difference
from peft_cl.metrics.usage import selection_diversity, usage_density
from peft_cl.trainer.strategy import STRATEGIES


def test_the_page_on_comparing_names_all_there_is():
    page = (Path(__file__).parents[1] / "docs" / "comparing.md").read_text()
    assert [name for name in (*MEASURES, *STRATEGIES, *METHODS) if f"`{name}`" not in page] == [
        "l2p",
        "dualprompt",
        "coda",
    ]


def test_the_paired_test_is_scipys():
    rng = np.random.default_rng(0)
    values, others = rng.normal(0.5, 0.1, 5), rng.normal(0.4, 0.1, 5)
    found = paired_difference(values.tolist(), others.tolist())
    expected = ttest_rel(values, others)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.mean == pytest.approx((values - others).mean())
    assert found.deviation == pytest.approx((values - others).std(ddof=1))


def test_without_spread_or_without_pairs():
    assert paired_difference([0.5, 0.6], [0.5, 0.6]).p == 1.0
    assert paired_difference([0.6, 0.7], [0.5, 0.6]).p == 0.0
    assert math.isnan(paired_difference([0.5], [0.4]).p)
    with pytest.raises(ValueError, match="There are 2 values and 1 of the other method"):
        paired_difference([0.5, 0.6], [0.5])


def test_holms_correction():
    """By hand: 0.01 x 4, 0.02 x 3, 0.03 x 2, and 0.04, which may not be below the one before."""
    assert holm([0.02, 0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.06, 0.04, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    corrected = holm([math.nan, 0.02])
    assert math.isnan(corrected[0]) and corrected[1] == 0.02


def test_use_of_the_pool():
    assert selection_diversity([[1, 1, 1, 1]]) == 1.0
    assert selection_diversity([[4, 0, 0, 0], [0, 4, 0, 0]]) == 0.5
    assert selection_diversity([[4], [4]]) == 0.0
    assert usage_density([[4, 0, 0, 0], [1, 1, 0, 0]]) == pytest.approx((0.25 + 0.5) / 2)


def test_numbers_as_text():
    assert [millions(value) for value in (85_800_000, 92_200, 2_720_000, 640, 7.1e9)] == [
        "85.8M", "92.2k", "2.72M", "640", "7.10B",
    ]  # fmt: skip
    accuracy = MEASURES["average-accuracy"]
    assert accuracy.cell([0.5]) == "50.00" and accuracy.cell([0.5, 0.6]) == "55.00 ± 7.07"
    assert accuracy.cell([0.5, None]) == "–"
    assert MEASURES["first-task"].cell([(0.9, 0.5), (0.8, 0.4)]) == "85.00 ± 7.07 → 45.00 ± 7.07"
    assert MEASURES["selection-diversity"].cell([0.42]) == "low (0.42)"
    assert MEASURES["prompt-usage"].cell([0.5, 0.6]) == "balanced (0.55) ± 0.07"
