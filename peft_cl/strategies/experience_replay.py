"""Experience replay: a small memory of earlier training images is mixed into every batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import PeftModel

from ..scenarios import Task
from ..scenarios.columns import is_count
from ..trainer import ContinualTrainer, Strategy
from ..trainer.examples import TaskExamples


class ExperienceReplay(Strategy):
    """ER with a reservoir (Chaudhry et al. 2019, arXiv 1902.10486; reservoir sampling: Vitter 1985).

    Each step trains on the batch and as many images drawn from the memory. The memory is a uniform sample of all
    training images seen, brought up to date at the end of each task; it holds places in the data sets, not copies.
    The adapter needs `train_mask=False`. DualPrompt's key of a task is pulled to the replayed queries too, so that
    rows are told apart less well at test.

    Args:
        memory_size: Images that the memory holds.
        replay_batch_size: Images drawn for each device's batch; None: as many as the batch has.

    Raises:
        ValueError: sizes below 1.
    """

    name = "ER"
    trains_earlier_classes = True
    has_task_evidence = False
    learns_streams = False

    def __init__(self, memory_size: int = 500, replay_batch_size: int | None = None):
        for label, size in (("memory_size", memory_size), ("replay_batch_size", replay_batch_size)):
            if size is not None and not is_count(size):
                raise ValueError(f"{label} is {size!r}, but must be a whole number of at least 1.")
        self.memory_size = memory_size
        self.replay_batch_size = replay_batch_size
        self.limits = (f"It was trained with a memory of {memory_size} training images.",)
        self._empty()

    def _empty(self) -> None:
        #: Task and row of each image in memory, int64 (images, 2), and how many images there were to choose from.
        self.memory = np.zeros((0, 2), dtype=np.int64)
        self.seen = 0
        self._kept: list[Task] = []
        self._examples: TaskExamples | None = None

    def prepare(self, model: PeftModel) -> None:
        self._empty()  # its rows are of another trainer's scenario

    def settings(self) -> dict[str, Any]:
        return {"memory_size": self.memory_size, "replay_batch_size": self.replay_batch_size}

    def begin_task(self, trainer: ContinualTrainer, task: Task) -> None:
        """Lay out the memory as tasks of a few examples each, with labels and queries of their own."""
        self._kept = [
            trainer.part_of(earlier, np.sort(self.memory[self.memory[:, 0] == earlier.index, 1]))
            for earlier in trainer.scenario[: task.index]
            if (self.memory[:, 0] == earlier.index).any()
        ]
        self._examples = trainer.examples(self._kept, "train") if self._kept else None

    def batch(self, trainer: ContinualTrainer, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._examples is None:
            return inputs
        # All processes draw for all of them, as many whatever their batches hold, and each takes its part.
        processes, own = trainer.accelerator.num_processes, trainer.accelerator.process_index
        most = self.replay_batch_size or max(len(inputs["labels"]), trainer.args.train_batch_size)
        drawn = torch.randint(len(self._examples), (most * processes,))[own * most :]
        replayed = trainer.training_batch(
            self._examples, drawn[: self.replay_batch_size or len(inputs["labels"])].tolist()
        )
        # Queries are kept of all images or of none: those of a data set with a transform of its own are not.
        return {
            name: torch.cat([value, replayed[name].to(value.dtype)])
            for name, value in inputs.items()
            if name in replayed or name != "query"
        }

    def end_task(self, trainer: ContinualTrainer, task: Task) -> None:
        """Reservoir sampling over the task's images: image number n takes a place with probability size / n."""
        generator = np.random.default_rng([trainer.args.seed, task.index])
        memory = list(map(tuple, self.memory.tolist()))
        for row in range(len(task.train)):
            self.seen += 1
            if len(memory) < self.memory_size:
                memory.append((task.index, row))
            elif (place := int(generator.integers(self.seen))) < self.memory_size:
                memory[place] = (task.index, row)
        self.memory = np.array(memory, dtype=np.int64).reshape(-1, 2)
        trainer.forget(self._kept)

    def state_dict(self) -> dict[str, Any]:
        return {"memory": torch.from_numpy(self.memory), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory = state["memory"].numpy()
        self.seen = state["seen"]
