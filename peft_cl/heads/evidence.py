"""Task evidence: what the query says about the task, for the choice between classes of different tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn


class TaskFacts(Protocol):
    """What it must know of an adapter: the classes of each task, and the weight."""

    num_tasks: int
    task_evidence: float


class TaskEvidence(nn.Module):
    """The mean unit query of each task, and what it adds to the logits in evaluation.

    The masked cross-entropy compares the classes of one task only: the difference between logits of two tasks is
    never trained. The query, by which prompts are chosen, tells tasks apart to some degree, so the logit of class c of
    task t gets

        task_evidence * cos(query, mean query of t).

    It is a term of ours, akin to the task inference of HiDe-Prompt (Wang et al., NeurIPS 2023, arXiv 2310.07234), but
    added to the raw logits: how peaked they are over a task's classes tells tasks apart too. It is nearest class mean
    in cosine, with tasks for classes. For a class of several tasks their terms are joined by log-sum-exp; a task that
    nothing was learnt of yet gets the mean of the others.

    Buffers: `task_queries` (tasks, D), `task_counts` (tasks,), the images that each mean is of.

    Args:
        size: D.
        config: the adapter's configuration: its tasks, and the weight.
    """

    def __init__(self, size: int, config: TaskFacts):
        super().__init__()
        self.config, self.size = config, size
        self.register_buffer("task_queries", torch.zeros(config.num_tasks, size))
        self.register_buffer("task_counts", torch.zeros(config.num_tasks))

    def grow(self) -> None:
        """Make room for the tasks begun."""
        began = self.config.num_tasks - len(self.task_queries)
        self.task_queries = F.pad(self.task_queries, (0, 0, 0, began))
        self.task_counts = F.pad(self.task_counts, (0, began))

    def take(self, parts: Sequence[tuple[TaskEvidence, Sequence[int]]]) -> None:
        """Have the means of these tasks of others, one behind the other."""
        for name in ("task_queries", "task_counts"):
            rows = [getattr(evidence, name)[list(tasks)] for evidence, tasks in parts]
            setattr(self, name, torch.cat(rows).to(getattr(self, name)))

    @torch.no_grad()
    def observe(self, query: torch.Tensor) -> None:
        """Let the current task's mean see the queries (B, D) of a training step; a query that is not finite is left
        out."""
        if not len(self.task_queries):
            return
        # A running mean, not a sum: a sum of thousands of images does not fit half precision.
        query = F.normalize(query.float(), dim=-1)
        finite = query.isfinite().all(-1, keepdim=True)
        mean, count = self.task_queries[-1], self.task_counts[-1]
        count += finite.sum()
        mean += (query.where(finite, mean.float()) - mean.float()).sum(0) / count.float().clamp_min(1)

    def merge_counts(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Join the current task's means of all processes; `total` sums a tensor over them."""
        count = total(self.task_counts[-1])
        self.task_queries[-1] = total(self.task_queries[-1] * self.task_counts[-1]) / count.clamp_min(1)
        self.task_counts[-1] = count

    def similarity(self, query: torch.Tensor) -> torch.Tensor:
        """Cosine of queries (B, D) with each task's mean query, (B, tasks); the mean of the others where there is
        none yet."""
        observed = self.task_counts > 0
        similarity = F.linear(F.normalize(query.float(), dim=-1), F.normalize(self.task_queries.float(), dim=-1))
        mean = similarity.where(observed, 0).sum(-1, keepdim=True) / observed.sum().clamp_min(1)
        return similarity.where(observed, mean)

    def forward(self, query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(B, D) queries, and which classes each task has, (tasks, classes) -> (B, classes)."""
        scores = self.config.task_evidence * self.similarity(query)
        highest = scores.amax(-1, keepdim=True)
        tiny = torch.finfo(scores.dtype).tiny
        return highest + ((scores - highest).exp() @ rows.float()).clamp_min(tiny).log()
