"""GEM and A-GEM: gradients that raise no loss on the memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from replay_cases import (
    config_for,
    make_small,  # noqa: F401
    on_backbone,
)
from scipy.optimize import LinearConstraint, minimize

from peft_cl import Strategy
from peft_cl import task_incremental as with_known_tasks
from peft_cl.strategies.gem import AGEM, GEM, gradient_of, own_batches, project, project_on_reference
from peft_cl.trainer.processes import kept_counts


# Made by `GEMPlugin(10, margin).solve_quadprog` of avalanche-lib 0.6.0, in float64.
GRADIENT = [3.8, -4.0, 19.2, 3.1, -16.1, 10.8]
CONSTRAINTS = [
    [39.1, 28.4, -21.1, -38.0, -18.7, 1.2],
    [-69.8, -6.6, -37.4, -22.0, -16.3, -9.5],
    [12.3, 31.3, -3.9, 41.0, -20.0, 10.5],
]
PROJECTED = {
    0.0: [-2.6921463, -2.9733691, 12.9288578, -2.2882054, -19.4643002, 9.6426830],
    0.5: [-5.4, 22.55, -12.0, -6.4, -43.6, 11.9],
}


@pytest.mark.parametrize("margin", PROJECTED)
def test_gem_projects_as_avalanche_does(margin):
    """They add 1e-3 to the diagonal of G G', where norms are 4,000 and more."""
    found = project(torch.tensor(GRADIENT), torch.tensor(CONSTRAINTS), margin)
    torch.testing.assert_close(found, torch.tensor(PROJECTED[margin]), rtol=1e-5, atol=1e-5)


def nearest(gradient: torch.Tensor, constraints: torch.Tensor) -> torch.Tensor:
    gradient, constraints = gradient.numpy(), constraints.numpy()
    found = minimize(
        lambda point: ((point - gradient) ** 2).sum() / 2,
        np.zeros_like(gradient),
        jac=lambda point: point - gradient,
        constraints=LinearConstraint(constraints, lb=0),
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    return torch.from_numpy(found.x)


def test_the_projected_gradient_is_the_nearest_that_satisfies_the_constraints():
    """Against a solver of the problem itself (eq. 8), not of its dual."""
    generator, projected = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        gradient, constraints = (torch.randn(*size, generator=generator).double() for size in ((8,), (4, 8)))
        found = project(gradient, 1e-3 * constraints)  # gradients of a trained network are small
        assert (constraints @ found >= -1e-9).all()
        projected += not torch.equal(found, gradient)
        torch.testing.assert_close(found, nearest(gradient, constraints), rtol=1e-5, atol=1e-6)
    assert projected > 10


def test_gem_with_tasks_of_one_gradient():
    """G G' has no inverse."""
    found = project(torch.tensor([-1.0, 1.0]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)


def test_a_gem_takes_out_what_is_against_the_reference():
    """By hand: along = -2, |r|^2 = 4."""
    gradient, reference = torch.tensor([-1.0, 3.0]), torch.tensor([2.0, 0.0])
    torch.testing.assert_close(project_on_reference(gradient, reference), torch.tensor([0.0, 3.0]))
    assert project_on_reference(-gradient, reference) is not None
    torch.testing.assert_close(project_on_reference(-gradient, reference), -gradient)


@pytest.mark.parametrize("on", ["multi-head backbone", "l2p"])
def test_gems_steps_are_along_the_gradients_of_all_earlier_tasks(on, make_trainer, data):
    along, turned = [], []

    class Before(Strategy):
        def after_backward(self, trainer):
            self.gradients = [value.grad.clone() for value in trainer.model.parameters() if value.grad is not None]

    class After(Strategy):
        def after_backward(self, trainer):
            parameters = [value for value in trainer.model.parameters() if value.grad is not None]
            turned.append(any(not torch.equal(a, b.grad) for a, b in zip(before.gradients, parameters, strict=True)))
            gradient = torch.cat([value.grad.flatten() for value in parameters])
            for each in zip(gem.store.parts, gem.memories, strict=True):
                with kept_counts(trainer.tuner):
                    memory = gradient_of(trainer, parameters, own_batches(trainer, *each))
                assert memory.any()
                along.append(float(F.cosine_similarity(memory, gradient, dim=0)))

    before, gem = Before(), GEM(12, margin=0.0)
    if on == "l2p":
        trainer = make_trainer(config_for(gem, "l2p"), strategy=[before, gem, After()], num_train_epochs=1)
    else:
        scenario = with_known_tasks(data, num_tasks=3)
        trainer = on_backbone(make_trainer, before, gem, After(), train_mask=True, scenario=scenario)
    trainer.train()
    assert np.bincount(gem.store.places[:, 0]).tolist() == [4, 4, 4]
    assert len(along) == 4 + 2 * 4 and min(along) > -1e-4
    assert not any(turned[:4]) and any(turned[4:])


def test_a_gems_step_is_along_the_reference(make_trainer):
    seen = []

    class Watched(AGEM):
        def projected(self, trainer, gradient, parameters):
            found = super().projected(trainer, gradient, parameters)
            seen.append((gradient, found))
            return found

    trainer = on_backbone(make_trainer, Watched(12, reference_batch_size=4), num_tasks=2)
    trainer.train()
    assert len(seen) == 6 and any(not torch.equal(before, after) for before, after in seen)
    assert all(after.norm() <= before.norm() * (1 + 1e-5) for before, after in seen)


def test_gem_looks_queries_up_once_for_each_task(make_trainer):
    """Each time the whole backbone is read, to see whether it is still the same."""
    trainer = make_trainer(config_for(GEM(), "l2p"), strategy=GEM(12), num_train_epochs=2)
    looked_up, queries = [], trainer.queries.queries

    def counted(tasks, split, *more):
        looked_up.append(split)
        return queries(tasks, split, *more)

    trainer.queries.queries = counted
    trainer.train()
    # Of three tasks; of the memory in the second and the third, and in them of each earlier task.
    assert looked_up.count("train") == 3 + 2 + (1 + 2)
