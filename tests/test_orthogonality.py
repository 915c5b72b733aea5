"""CODA-Prompt's orthogonality term, against the formula over all rows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from peft_cl import CodaPromptConfig
from peft_cl.tuners.base.pool import Geometry
from peft_cl.tuners.base.similarity import gram_sum, pair_sum
from peft_cl.tuners.coda.pool import CodaPromptPool


def test_gram_sum():
    rows = torch.tensor([[[1.0, 0.0], [0.5, 2.0]], [[1.0, 0.0], [0.0, 1.0]]])
    # Gram matrix [[1, .5], [.5, 4.25]] minus the identity: squares 0, .25, .25, 3.25^2; the second set is orthonormal
    assert gram_sum(rows, rows[:, :0]).item() == pytest.approx(0.25 + 0.25 + 3.25**2)
    assert gram_sum(rows[:, 1:], rows[:, :1]).item() == pytest.approx(0.25 + 0.25 + 3.25**2)  # the first is unit


def test_pair_sum():
    rows = torch.tensor([[[3.0, 4.0], [2.0, 0.0], [0.0, -1.0]], [[1.0, 0.0], [0.0, 1.0], [5.0, 0.0]]])
    # cosines of the pairs: .6, -.8, 0 and 0, 1, 0; each pair counts in both orders
    assert pair_sum(rows, rows[:, :0]).item() == pytest.approx(2 * 1.4 + 2 * 1.0)
    assert pair_sum(rows[:, 2:], rows[:, :2]).item() == pytest.approx(2 * 0.8 + 2 * 1.0)


@pytest.mark.parametrize("form", ["gram", "pairwise"])
def test_the_orthogonality_term_is_that_of_all_rows(form):
    """However many tasks there were, counted on from task to task or anew after loading; gradients too."""
    config = CodaPromptConfig(
        components_per_task=3, layers=[0, 2], prompt_length=2, orthogonality_coefficient=0.5, orthogonality=form
    )
    config.tasks = [[0]]
    pool = CodaPromptPool(config, Geometry(16, 3)).train()
    for task in range(4):
        if task:
            config.tasks.append([task])
            pool(torch.randn(2, 16))
            pool.begin_task(task)
        with torch.no_grad():  # as training moves them
            for parameter in pool.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert pool.rows_in_use == 12 and {name for _, name in pool.pair_sums.past} == set(pool._penalised)
    loaded = copy.deepcopy(pool)
    loaded.load_state_dict(pool.state_dict())
    assert not loaded.pair_sums.past
    expected = torch.zeros(())
    for name in pool._penalised:
        rows = torch.cat([getattr(pool, f"past_{name}"), getattr(pool, name)], dim=1).flatten(2)
        if form == "gram":
            expected = expected + (rows @ rows.mT - torch.eye(12)).square().mean(dim=(1, 2)).sum()
        else:
            cosines = F.normalize(rows, dim=-1) @ F.normalize(rows, dim=-1).mT
            expected = expected + (cosines.abs().sum((1, 2)) - 12).mean()
    gradients = torch.autograd.grad(0.5 * expected, [getattr(pool, name) for name in pool._penalised])
    for each in (pool, loaded):
        term = each(torch.randn(2, 16)).losses["orthogonality"]
        torch.testing.assert_close(term, 0.5 * expected)
        found = torch.autograd.grad(term, [getattr(each, name) for name in each._penalised])
        torch.testing.assert_close(found, gradients)
