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


class Flops:
    """Floating-point operations of learning, counted by torch's own counter; two for a multiplication and addition.

    Of the training steps of a task the first is counted and stands for all: counting takes time. What is computed once
    for each image (queries, features, Fisher information) is counted whole. Evaluations are not counted.

    Args:
        counts: whether anything is counted.

    Attributes:
        total: operations so far on this process; None if nothing is counted.
    """

    def __init__(self, counts: bool):
        self.counts = counts
        self.total: int | None = 0 if counts else None
        self._of_step: int | None = None
        self._is_open = False

    @contextmanager
    def counted(self) -> Iterator[None]:
        """What is computed inside the block counts as it is."""
        with self._counter() as counter:
            yield
        if counter is not None:
            self.total += counter.get_total_flops()

    @contextmanager
    def step(self) -> Iterator[None]:
        """The block is a training step."""
        with self._counter() if self._of_step is None else nullcontext() as counter:
            yield
        if counter is not None:
            self._of_step = counter.get_total_flops()

    def end_steps(self, steps: int) -> None:
        """`steps` training steps are done, one of which was counted."""
        if self._of_step is not None:
            self.total += self._of_step * steps
        self._of_step = None

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
