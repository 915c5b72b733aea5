"""Gradient episodic memory: no step may raise the loss on the memory, GEM and A-GEM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ..heads.sums import cholesky
from ..scenarios import Task
from ..trainer import ContinualTrainer, register_strategy
from ..trainer.examples import TaskExamples
from ..trainer.processes import kept_counts
from .memory import MemoryStrategy, drawn
from .settings import check_count, check_number


def project(gradient: torch.Tensor, constraints: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """The gradient, turned as little as it takes to raise the loss of no earlier task (GEM, eqs. 8-11).

    With G the constraints and g the gradient,

        min_z |z - g|^2 / 2  subject to  G z >= 0                                                          (eq. 8)

    has the dual  min_v v' G G' v / 2 + g' G' v  subject to  v >= 0,  and  z = G' v + g  (eq. 11). As in the authors'
    code, `margin` is the least v, which turns the gradient further than it must towards those of earlier tasks, and a
    gradient that violates no constraint stays as it is.

    Args:
        gradient: g, (P,).
        constraints: G, (tasks, P), the gradient of each earlier task's loss.
        margin: the least v, 0 or more.

    Returns:
        z, (P,).
    """
    along = constraints @ gradient
    if (along >= 0).all():  # eq. 7
        return gradient
    gram = (constraints @ constraints.T).double().cpu()
    dual = least_dual(gram, along.double().cpu(), margin)
    return gradient + constraints.T @ dual.to(gradient)  # eq. 11


def least_dual(gram: torch.Tensor, along: torch.Tensor, margin: float) -> torch.Tensor:
    """v >= margin with the least  v' `gram` v / 2 + `along`' v  (GEM, eq. 11), (tasks,), in float64 on the CPU.

    With v = margin + u and `gram` = L L' it is a problem of non-negative least squares: u >= 0 with the least
    |L' u + L^-1 (`along` + `gram` margin)|^2.
    """
    from scipy.optimize import nnls  # takes a while to import

    factor = cholesky(gram)
    offset = along + margin * gram.sum(-1)
    target = -torch.linalg.solve_triangular(factor, offset[:, None], upper=False)[:, 0]
    found, _ = nnls(factor.T.numpy(), target.numpy())
    return torch.from_numpy(found) + margin


def project_on_reference(gradient: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The gradient (P,) without its part against the `reference` gradient (P,), if it has one (A-GEM, eqs. 10-11)."""
    along = gradient @ reference
    if along >= 0:
        return gradient
    return gradient - along / (reference @ reference) * reference  # eq. 11


class _Projecting(MemoryStrategy):
    """What GEM and A-GEM share: the gradient is projected before each step of the optimizer."""

    def after_backward(self, trainer: ContinualTrainer) -> None:
        if self.store.examples is None:
            return
        parameters = [value for value in trainer.model.parameters() if value.grad is not None]
        gradient = torch.cat([value.grad.flatten() for value in parameters]).float()
        with kept_counts(trainer.tuner):
            projected = self.projected(trainer, gradient, parameters)
        sizes = [value.numel() for value in parameters]
        for value, part in zip(parameters, projected.split(sizes), strict=True):
            value.grad.copy_(part.view_as(value))

    def projected(
        self, trainer: ContinualTrainer, gradient: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
    ) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define projected(trainer, gradient, parameters)")


@register_strategy("gem")
class GEM(_Projecting):
    """Gradient episodic memory, GEM (Lopez-Paz & Ranzato 2017, arXiv 1706.08840, eqs. 6-11).

    Before each step the gradient of the memory of each earlier task is computed, and that of the batch is projected to
    the nearest one that raises the loss of none of them. The loss on the memory is that of training: over all classes
    seen, or with `train_mask=True` over the classes of each image's own task, as in the paper, whose tasks have heads
    of their own. The memory is divided among the tasks seen; its images are not augmented.

    Each step goes through the whole memory, and one gradient for each earlier task is held: a few hundred images on an
    adapter. `AGEM` is the cheap form.

    Args:
        memory_size: images that the memory holds.
        margin: gamma, 0 or more: how far the gradient is turned beyond what it must towards those of earlier tasks.

    Raises:
        ValueError: a size below 1, or a negative margin.

    Example:
        >>> config = LinearProbeConfig(train_mask=True)  # a task_incremental scenario      # doctest: +SKIP
        >>> ContinualTrainer(get_peft_model(base, config), args, scenario, processing_class=processor,
        ...                  strategy=[FineTuning(), GEM(memory_size=200)]).train()         # doctest: +SKIP
    """

    name = "GEM"

    def __init__(self, memory_size: int = 500, margin: float = 0.5):
        super().__init__(memory_size, "tasks")
        self.margin = check_number("margin", margin, 0.5, least=0)
        #: The memory of each earlier task.
        self.memories: list[TaskExamples] = []

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "margin": self.margin}

    def begin_task(self, trainer: ContinualTrainer, task: Task) -> None:
        super().begin_task(trainer, task)
        # Once: to look up queries that are kept, the whole backbone is read.
        self.memories = [
            trainer.plain_examples(part, with_queries=trainer.args.cache_queries) for part in self.store.parts
        ]

    def end_task(self, trainer: ContinualTrainer, task: Task) -> None:
        super().end_task(trainer, task)
        self.memories = []

    def projected(self, trainer, gradient, parameters):
        earlier = zip(self.store.parts, self.memories, strict=True)
        rows = [gradient_of(trainer, parameters, own_batches(trainer, *each)) for each in earlier]
        constraints = trainer.accelerator.reduce(torch.stack(rows), "sum")
        if not (gradient.isfinite().all() and constraints.isfinite().all()):
            return overflown(trainer, gradient)
        return project(gradient, constraints, self.margin)


@register_strategy("a-gem")
class AGEM(_Projecting):
    """Averaged GEM, A-GEM (Chaudhry et al. 2019, arXiv 1812.00420, eqs. 10-11).

    As `GEM`, with one constraint: the loss on a batch drawn from the whole memory must not rise. A step costs about
    two. The memory holds as many images of each class seen.

    Args:
        memory_size: images that the memory holds.
        reference_batch_size: images drawn for each device; None: as many as a batch has.

    Raises:
        ValueError: sizes below 1.

    Example:
        >>> strategy = [FineTuning(), AGEM(memory_size=500, reference_batch_size=64)]      # doctest: +SKIP
    """

    name = "A-GEM"

    def __init__(self, memory_size: int = 500, reference_batch_size: int | None = None):
        super().__init__(memory_size, "balanced")
        self.reference_batch_size = check_count("reference_batch_size", reference_batch_size, 32, or_none=True)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "reference_batch_size": self.reference_batch_size}

    def projected(self, trainer, gradient, parameters):
        examples, count = self.store.examples, self.reference_batch_size or trainer.args.train_batch_size
        indices = drawn(trainer, len(examples), count, count)
        batch = {**trainer.training_batch(examples, indices), "task": self.store.tasks_of(indices)}
        reference = trainer.accelerator.reduce(gradient_of(trainer, parameters, [(batch, 1.0)]), "mean")
        if not (gradient.isfinite().all() and reference.isfinite().all()):
            return overflown(trainer, gradient)
        return project_on_reference(gradient, reference)


# ------------------------------------------------------------------------------------------------------- gradients


def own_batches(
    trainer: ContinualTrainer, task: Task, memory: TaskExamples
) -> Iterable[tuple[dict[str, torch.Tensor], float]]:
    """This process's share of the memory of a task, as batches with their share of all."""
    rows = range(trainer.args.process_index, len(memory), trainer.args.world_size)
    if not len(rows):
        return
    for batch in trainer.batches_of(memory, trainer.args.train_batch_size, rows=rows):
        images = len(batch["labels"])
        yield {**batch, "task": torch.full((images,), task.index)}, images / len(memory)


def gradient_of(
    trainer: ContinualTrainer,
    parameters: Sequence[torch.nn.Parameter],
    batches: Iterable[tuple[dict[str, torch.Tensor], float]],
) -> torch.Tensor:
    """The gradient (P,) of the loss of training on other images, by `parameters`.

    With fp16 it has the loss scale that the gradients in place have: the projection is the same at any scale.

    Args:
        batches: with the number of each image's `task` in the scenario; and what their losses count.
    """
    model, scaler = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.scaler
    scale = 1.0 if scaler is None else scaler.get_scale()
    total = torch.cat([torch.zeros_like(value).flatten() for value in parameters]).float()
    for batch, share in batches:
        given = {name: value for name, value in batch.items() if name != "task"}
        if trainer.tuner.head.config.train_mask:  # a loss over the classes of each image's own task
            given["task_ids"] = (batch["task"] + trainer.tasks_before).to(trainer.args.device)
        with trainer.accelerator.autocast():
            loss = model(**given).loss
        found = torch.autograd.grad(loss * (share * scale), parameters, allow_unused=True)
        parts = [
            torch.zeros_like(value) if part is None else part for value, part in zip(parameters, found, strict=True)
        ]
        total += torch.cat([part.flatten() for part in parts])
    return total


def overflown(trainer: ContinualTrainer, gradient: torch.Tensor) -> torch.Tensor:
    """What stands in the place of a gradient that cannot be projected, as numbers in it are not finite.

    With fp16 the step is left out and the loss scale lowered, as for any overflow.
    """
    return gradient if trainer.accelerator.scaler is None else torch.full_like(gradient, np.inf)
