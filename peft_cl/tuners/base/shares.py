"""What a new adapter takes of others: joining, splitting and forgetting are the same, with other shares."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .config import PromptPoolConfig
from .digests import digest_of_weights
from .parts import Part
from .pool_config import PoolConfig


if TYPE_CHECKING:
    from ...heads import Head
    from .pool import PromptPool


#: What a configuration says of the sizes of its pool.
POOL_FACTS = ("joined", "joined_prompts", "grown", "pool_size", "max_pool_size")


@dataclass(frozen=True)
class Share:
    """Some tasks of an adapter, and the rows of its pool that go with them.

    Attributes:
        config, pool, head: The adapter's.
        parts: What is taken of each of its pool's parts; each has a task.
        part_numbers: Their numbers in the pool; none where the prompts are those of the share before.
        unused: Rows that no task uses yet.
    """

    config: PromptPoolConfig
    pool: Any
    head: Head
    parts: list[Part]
    part_numbers: list[int]
    unused: list[int]

    @property
    def tasks(self) -> list[int]:
        return [task for part in self.parts for task in part.tasks]

    @property
    def rows(self) -> list[int]:
        return [row for part in self.parts for row in part.rows]

    @property
    def pool_tasks(self) -> list[int]:
        """Its tasks as the pool counts them: one that learns in the first task alone has one for each part."""
        return self.part_numbers if self.config.train_prompts == "first_task" else self.tasks

    @property
    def classes(self) -> list[str]:
        """Names of its tasks' classes, in the order in which they were learnt."""
        names = self.config.classes
        return list(dict.fromkeys(names[row] for task in self.tasks for row in self.config.tasks[task]))

    @property
    def head_rows(self) -> list[int]:
        return [self.config.classes.index(name) for name in self.classes]

    @property
    def is_apart(self) -> bool:
        """Whether its prompts were learnt with images of its tasks alone, and those of other tasks are left."""
        tasks = {task for number in self.part_numbers for task in self.pool.parts[number].tasks}
        return not any(True for _ in self.pool.parameters()) or tasks == set(self.tasks)


def share_of(config: PromptPoolConfig, pool: PromptPool, head: Head, tasks: Sequence[int] | None = None) -> Share:
    """The share of `tasks`, or of all. Where each task brought rows of its own, these; else all rows of the part."""
    wanted = set(range(config.num_tasks) if tasks is None else tasks)
    own = None if config.train_prompts == "first_task" else getattr(config, "rows_per_task", None)
    parts, numbers = [], []
    for number, part in enumerate(pool.parts):
        kept = [task for task in part.tasks if task in wanted]
        if kept:
            rows = part.rows if own is None else [task * own + place for task in kept for place in range(own)]
            parts.append(Part(list(rows), kept))
            numbers.append(number)
    total = pool.rows("keys").shape[-2] if pool.row_axes else 0
    return Share(config, pool, head, parts, numbers, list(range(pool.rows_in_use, total)))


def without_repeats(shares: Sequence[Share]) -> list[Share]:
    """The shares, of which those with the same prompts as the one before bring none. Where each task brought rows of
    its own, all bring theirs."""
    found, before = [], None
    for share in shares:
        digest = digest_of_weights(share.pool)
        if digest == before and len(share.parts) == 1 and _shares_rows(share.config):
            share = replace(share, parts=[Part([], share.tasks)], part_numbers=[], unused=[])
        found.append(share)
        before = digest
    return found


def _shares_rows(config: PromptPoolConfig) -> bool:
    return config.train_prompts == "first_task" or getattr(config, "rows_per_task", None) is None


def new_config(shares: Sequence[Share], prompts: str) -> PromptPoolConfig:
    """The configuration of an adapter that is made of these shares.

    Args:
        prompts: its `joined_prompts`.
    """
    config = copy.deepcopy(shares[0].config)
    config.classes = list(dict.fromkeys(name for share in shares for name in share.classes))
    row = {name: number for number, name in enumerate(config.classes)}
    config.tasks = [
        [row[share.config.classes[own]] for own in share.config.tasks[task]]
        for share in shares
        for task in share.tasks
    ]
    config.forget_temperature()
    config.source = config._saved = config.rows_in_use = None
    config.inference_mode = False
    if isinstance(config, PoolConfig):
        parts: list[Part] = []
        for share in shares:
            if share.part_numbers:
                parts += share.parts
            else:
                parts[-1] = Part(parts[-1].rows, [*parts[-1].tasks, *share.tasks])
        config.joined = [[len(part.rows), len(part.tasks)] for part in parts[:-1]] or None
        config.joined_prompts = prompts if config.joined else "apart"
        adding = [share for share in shares if share.part_numbers]
        total = sum(len(share.rows) + len(share.unused) for share in adding)
        config.take_sizes(total, [share.config for share in adding])
    return config
