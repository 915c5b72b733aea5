"""A memory of training images: which ones it keeps, and how they come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from ..scenarios import Task
from ..trainer import ContinualTrainer, Strategy
from ..trainer.examples import TaskExamples, places_of
from ..trainer.strategy import cannot_combine
from .settings import check_count


class Memory:
    """Places (task, row) of at most `size` training images; no image is copied.

    How it is filled after a task (`take`) is its rule:

    - `"reservoir"`: a uniform sample of all images seen (Vitter 1985, algorithm R);
    - `"balanced"`: as many images of each class seen, as even as can be; the surplus of earlier classes goes;
    - `"tasks"`: as many of each task.

    The two latter keep a uniform sample within each class or task.

    Args:
        size: images, at least 1.
        rule: one of the above.

    Attributes:
        places: int64 (images, 2), the task's number and the row in its training data.
        seen: images there were to choose from, for the reservoir.
        parts: the memory as tasks of a few examples each, after `lay_out`.
        examples: the same images as examples of training; None if there are none.
    """

    def __init__(self, size: int, rule: str = "reservoir"):
        self.size, self.rule = size, rule
        self.empty()

    def empty(self) -> None:
        self.places = np.zeros((0, 2), dtype=np.int64)
        self.seen = 0
        self._clear()

    def _clear(self) -> None:
        self.parts: list[Task] = []
        self.examples: TaskExamples | None = None
        #: Places of `examples`, a number for each in `_keys`, and the order in which those rise.
        self._laid_out = self.places[:0]
        self._keys, self._order = keys_of(self._laid_out), np.arange(0)

    def __len__(self) -> int:
        return len(self.places)

    # ----------------------------------------------------------------------------------------------- filling

    def take(self, trainer: ContinualTrainer, task: Task) -> None:
        """Choose among the memory and the images of a task that was learnt."""
        new = places_of(task)
        if self.rule == "reservoir":
            self.stream(new, np.random.default_rng([trainer.args.seed, task.index]))
            return
        known = np.concatenate([self.places, new])
        groups = known[:, 0] if self.rule == "tasks" else self.labels(trainer, known)
        self.places = known[balanced(groups, draws_of(trainer, known), self.size)]

    def stream(self, new: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Let images (count, 2) pass by the reservoir. Returns the place that each took in it, -1 for none."""
        slots = reservoir_slots(self.size, self.seen, len(new), generator)
        self.seen += len(new)
        room = np.zeros((min(self.seen, self.size) - len(self.places), 2), dtype=np.int64)
        self.places = np.concatenate([self.places, room])
        for slot, place in zip(slots, new, strict=True):  # a place may be taken twice: the last one stays
            if slot >= 0:
                self.places[slot] = place
        return slots

    @staticmethod
    def labels(trainer: ContinualTrainer, places: np.ndarray) -> np.ndarray:
        """The model's labels (images,) of images at `places`."""
        found = np.zeros(len(places), dtype=np.int64)
        for number in np.unique(places[:, 0]):
            own = places[:, 0] == number
            labels = trainer.scenario.model_labels(trainer.scenario[int(number)], "train", trainer.classes_before)
            found[own] = labels[places[own, 1]]
        return found

    # ----------------------------------------------------------------------------------------------- coming back

    def lay_out(self, trainer: ContinualTrainer, tasks: Sequence[Task], whole: Sequence[Task] = ()) -> None:
        """Lay out what it holds of `tasks` as tasks of a few examples, with labels and queries of their own.

        Args:
            trainer: the trainer.
            tasks: in the scenario's order.
            whole: tasks all of whose images are laid out behind these, as they may come into the memory.
        """
        self.forget(trainer)
        laid_out = []
        for task in tasks:
            rows = np.sort(self.places[self.places[:, 0] == task.index, 1])
            if len(rows):
                self.parts.append(trainer.part_of(task, rows))
                laid_out.append(places_of(task)[rows])
        laid_out += [places_of(task) for task in whole]
        if laid_out:
            self._laid_out = np.concatenate(laid_out)
            self._keys = keys_of(self._laid_out)
            self._order = np.argsort(self._keys)
            self.examples = trainer.examples([*self.parts, *whole], "train")

    def forget(self, trainer: ContinualTrainer) -> None:
        """Let go of what is kept of the images that were laid out."""
        trainer.forget(self.parts)
        self._clear()

    def indices_of(self, places: np.ndarray) -> np.ndarray:
        """Where images at `places` are in `examples`, (images,)."""
        return self._order[np.searchsorted(self._keys, keys_of(places), sorter=self._order)]

    def tasks_of(self, indices: Sequence[int]) -> torch.Tensor:
        """Numbers of the tasks, (images,), that images of `examples` belong to."""
        return torch.from_numpy(self._laid_out[list(indices), 0])

    # ----------------------------------------------------------------------------------------------- keeping

    def state(self) -> dict[str, Any]:
        return {"memory": torch.from_numpy(self.places.copy()), "seen": self.seen}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned. What is laid out stays."""
        self.places, self.seen = state["memory"].numpy().copy(), state["seen"]

    def bytes(self, trainer: ContinualTrainer) -> int:
        """What its images take as the model reads them, a byte for each of three colours."""
        size = trainer.image_size
        return len(self) * 3 * size[0] * size[1]


class MemoryStrategy(Strategy):
    """Base of methods with a memory of images, which is filled after each task.

    Args:
        memory_size: images that the memory holds, at least 1.
        rule: how it is filled (`Memory`).

    Raises:
        ValueError: a size below 1.
    """

    has_task_evidence = False
    learns_streams = False

    def __init__(self, memory_size: int, rule: str = "reservoir"):
        self.memory_size = check_count("memory_size", memory_size, 500)
        self.limits = (f"It was trained with a memory of {memory_size} training images.",)
        self.store = Memory(self.memory_size, rule)

    def settings(self) -> dict[str, Any]:
        return {"memory_size": self.memory_size}

    def check_beside(self, others: Sequence[Strategy]) -> None:
        for other in others:
            if isinstance(other, MemoryStrategy):
                raise cannot_combine([self, other], "each keeps a memory of images")

    def prepare(self, model: PeftModel) -> None:
        self.store.empty()  # its rows are of another trainer's scenario

    def begin_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self.store.lay_out(trainer, trainer.scenario[: task.index])

    def end_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self.store.take(trainer, task)
        self.store.forget(trainer)

    def state_dict(self) -> dict[str, Any]:
        return self.store.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.store.load(state)

    def kept_bytes(self, trainer: ContinualTrainer) -> dict[str, int]:
        return {"memory": self.store.bytes(trainer)}


# ------------------------------------------------------------------------------------------------------- choosing


def keys_of(places: np.ndarray) -> np.ndarray:
    """A number of each place, (images,)."""
    return places[:, 0] << 32 | places[:, 1]


def reservoir_slots(size: int, seen: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """The place in a memory of `size` that each of `count` images takes after `seen` others; -1 for none.

    Image number n takes a place with probability size / n (Vitter 1985, algorithm R).
    """
    slots = []
    for number in range(seen + 1, seen + count + 1):
        slot = number - 1 if number <= size else int(generator.integers(number))
        slots.append(slot if slot < size else -1)
    return np.array(slots, dtype=np.int64)


def even_shares(available: Sequence[int], size: int) -> list[int]:
    """Divide `size` places among groups of `available` images: as even as can be, and no place is left empty.

    Example:
        >>> even_shares([10, 2, 10], 9)
        [3, 2, 4]
    """
    shares = [0] * len(available)
    for done, group in enumerate(sorted(range(len(available)), key=lambda each: available[each])):
        shares[group] = min(available[group], size // (len(available) - done))
        size -= shares[group]
    return shares


def balanced(groups: np.ndarray, draws: np.ndarray, size: int) -> np.ndarray:
    """Rows of `size` images, as many of each group: within a group those of the lowest draws, a uniform sample.

    Args:
        groups: (images,), which group each belongs to.
        draws: (images,), a random number of each image, the same whenever it is asked.
    """
    numbers, counts = np.unique(groups, return_counts=True)
    kept = []
    for number, share in zip(numbers, even_shares(counts.tolist(), size), strict=True):
        own = np.flatnonzero(groups == number)
        kept.append(own[np.argsort(draws[own], kind="stable")[:share]])
    return np.sort(np.concatenate(kept))


def draws_of(trainer: ContinualTrainer, places: np.ndarray) -> np.ndarray:
    """A random number of each image, (images,), which depends on the seed and its place alone."""
    found = np.zeros(len(places))
    for number in np.unique(places[:, 0]):
        own = places[:, 0] == number
        count = len(trainer.scenario[int(number)].train)
        found[own] = np.random.default_rng([trainer.args.seed, int(number)]).random(count)[places[own, 1]]
    return found


# ------------------------------------------------------------------------------------------------------- drawing


def drawn(trainer: ContinualTrainer, images: int, count: int, most: int) -> list[int]:
    """Numbers below `images` for `count` images of this process's step, drawn with replacement.

    All processes draw for all of them, `most` each whatever their batches hold, and each takes its part.
    """
    own = trainer.accelerator.process_index * most
    everyone = torch.randint(images, (most * trainer.accelerator.num_processes,))
    return everyone[own:][:count].tolist()


def joined(inputs: Mapping[str, torch.Tensor], more: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch with further images behind its own.

    Queries are kept of all images or of none: those of a data set with a transform of its own are not.
    """
    return {
        name: torch.cat([value, more[name].to(value.dtype)])
        for name, value in inputs.items()
        if name in more or name != "query"
    }
