"""The parts of a joined adapter's pool: rows and tasks that came from one adapter each, kept apart at test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch


if TYPE_CHECKING:
    from .pool_config import PoolConfig


class Part(NamedTuple):
    """What one adapter brought: rows of the pool, and tasks, by their numbers in the joined adapter."""

    rows: Sequence[int]
    tasks: Sequence[int]


def parts_of(config: PoolConfig, rows: int) -> list[Part]:
    """The parts of a pool of which `rows` are in use. What is learnt after joining belongs to the last part."""
    found, row, task = [], 0, 0
    for count, tasks in config.joined or ():
        found.append(Part(range(row, row + count), range(task, task + tasks)))
        row, task = row + count, task + tasks
    return [*found, Part(range(row, rows), range(task, config.num_tasks))]


def best_part(similarity: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """The part whose keys fit an image best: that of the most similar row, on the mean over the sets of keys.

    Args:
        similarity: (sets, B, rows).

    Returns:
        (B,) numbers of parts.
    """
    fits = [similarity[..., part.rows[0] : part.rows[-1] + 1].amax(-1).mean(0) for part in parts]
    return torch.stack(fits, dim=-1).argmax(-1)


def likely_part(scores: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """The part with the most likely task: (B,) numbers, from the scores (B, tasks) of the tasks."""
    return torch.stack([scores[:, list(part.tasks)].amax(-1) for part in parts], dim=-1).argmax(-1)


def parts_of_tasks(tasks: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """The part that each of the tasks (B,) belongs to; numbers out of range count as the last or first task."""
    ends = tasks.new_tensor([part.tasks[-1] for part in parts[:-1]])
    return torch.bucketize(tasks, ends)


def outside(chosen: torch.Tensor, parts: Sequence[Part], rows: int) -> torch.Tensor:
    """Boolean (B, rows): the rows that are not of the part chosen (B,) for an image."""
    number = torch.zeros(rows, dtype=torch.long, device=chosen.device)
    for part in parts[1:]:
        number[part.rows[0] :] += 1
    return number != chosen[:, None]
