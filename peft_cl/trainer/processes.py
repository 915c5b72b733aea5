"""Several processes: what the last batch of an epoch holds on each of them, and counts that are kept meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from ..heads import SolvedHead
from ..tuners.base.model import PromptPoolModel


#: Rows of each process that are sent to the others at a time.
GATHERED = 65_536


def without_repeats(
    batch: dict[str, torch.Tensor], examples: int, accelerator: Accelerator
) -> tuple[dict[str, torch.Tensor], float]:
    """A batch without the examples that fill up an epoch's last one, and what its mean counts for.

    Where a task's size does not divide by the batches of all processes together, accelerate completes the last ones
    with examples from the start, which would be learnt twice. The mean over processes of the weighted means is the
    mean over the real examples. A process without any keeps one, of weight 0: all processes take each step.

    Args:
        batch: this process's.
        examples: of an epoch, on all processes.
    """
    state, processes = accelerator.gradient_state, accelerator.num_processes
    if processes == 1 or not state.end_of_dataloader:
        return batch, 1.0
    size = len(next(iter(batch.values())))
    # accelerate does not know it (-1) in an epoch that is gone on with from a checkpoint.
    left = state.remainder if state.remainder >= 0 else examples % (size * processes)
    if left == 0:
        return batch, 1.0
    real = min(max(left - accelerator.process_index * size, 0), size)
    return {name: value[: max(real, 1)] for name, value in batch.items()}, real * processes / left


def share_of(count: int, accelerator: Accelerator) -> list[int]:
    """The rows of `count` that this process goes through: as many on each of them, so that all run as many batches.

    Where they do not divide, a process has the last row as well.
    """
    first, step = accelerator.process_index, accelerator.num_processes
    return [min(first + step * index, count - 1) for index in range(-(-count // step))]


def over_processes(
    accelerator: Accelerator, count: int, compute: Callable[[Sequence[int]], torch.Tensor]
) -> torch.Tensor:
    """What `compute` gives for all of `count` rows, (count, ...) on the CPU: each process computes its share, and all
    get the whole.

    Args:
        compute: makes a tensor (rows, ...) on the CPU of rows.
    """
    if accelerator.num_processes == 1 or not count:
        return compute(range(count))
    own, found = compute(share_of(count, accelerator)), []
    for part in own.split(GATHERED):  # what one device holds of all processes at a time
        everyone = accelerator.gather(part.to(accelerator.device)).cpu()
        found.append(everyone.unflatten(0, (accelerator.num_processes, len(part))).transpose(0, 1).flatten(0, 1))
    return torch.cat(found)[:count]


def true_everywhere(accelerator: Accelerator, value: bool) -> bool:
    """Whether it is true on every process."""
    if accelerator.num_processes == 1:
        return value
    return bool(accelerator.gather(torch.tensor([int(value)], device=accelerator.device)).all())


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Put the buffers of `module` back, at the block's end, to what they were."""
    own = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in module.named_buffers():
            buffer.copy_(own[name])


@contextmanager
def kept_counts(tuner: PromptPoolModel) -> Iterator[None]:
    """Put all that is counted in training back, at the block's end, to what it was: buffers, and what heads observed
    since they were last fitted."""
    heads = [head for head in tuner.head.active.modules() if isinstance(head, SolvedHead)]
    pending = [None if head.pending is None else head.pending.clone() for head in heads]
    try:
        with kept_buffers(tuner):
            yield
    finally:
        for head, own in zip(heads, pending, strict=True):
            # Never without any again: processes add up theirs together.
            head.pending = own or (None if head.pending is None else head.empty_sums())
