"""What a run takes beside time: floating-point operations, and memory at its peak."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


try:
    import resource
except ImportError:  # on Windows
    resource = None


#: Attention of torch's CPU kernels, which its counter leaves out; the functions get the shapes of the tensors.
ALSO_COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


#: Steps of the optimizer that are counted in each task.
COUNTED_STEPS = 2


class Flops:
    """Floating-point operations of learning, counted by torch's own counter; two for a multiplication and addition.

    Of a task's steps of the optimizer the first two are counted, and the larger one stands for all that follow:
    counting takes time, the first may find a memory empty, and the second may have a smaller batch. What is computed
    once for each image (queries, features, Fisher information) is counted whole. Evaluations are not counted.

    Args:
        counts: whether anything is counted.

    Attributes:
        total: operations so far on this process; None if nothing is counted.
    """

    def __init__(self, counts: bool):
        self.counts = counts
        self.total: int | None = 0 if counts else None
        #: Of the optimizer's steps that are counted; the last one is under way while `_ends` is False.
        self._of_steps: list[int] = []
        self._ends = True
        self._is_open = False

    @contextmanager
    def counted(self) -> Iterator[None]:
        """What is computed inside the block counts as it is."""
        with self._counter() as counter:
            yield
        if counter is not None:
            self.total += counter.get_total_flops()

    @contextmanager
    def step(self, ends: bool = True) -> Iterator[None]:
        """The block is a batch's part of a step of the optimizer; the last one of the batches `ends` it."""
        with nullcontext() if self._ends and len(self._of_steps) == COUNTED_STEPS else self._counter() as counter:
            yield
        if counter is not None:
            if self._ends:
                self._of_steps.append(0)
            self._of_steps[-1] += counter.get_total_flops()
            self._ends = ends

    def end_steps(self, steps: int) -> None:
        """`steps` steps of the optimizer are done, of which the first were counted."""
        if self._of_steps:
            counted = self._of_steps[:steps]
            self.total += sum(counted) + max(self._of_steps) * (steps - len(counted))
        self._of_steps, self._ends = [], True

    def _counter(self) -> Any:
        """Counts what is computed inside, unless a block around does already."""
        if not self.counts or self._is_open:
            return nullcontext()
        return self._open()

    @contextmanager
    def _open(self) -> Iterator[FlopCounterMode]:
        self._is_open = True
        try:
            with FlopCounterMode(display=False, custom_mapping=ALSO_COUNTED) as counter:
                yield counter
        finally:
            self._is_open = False


def peak_memory(device: torch.device) -> int | None:
    """Bytes of memory in use at the peak of this process: the device's that tensors took, on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
