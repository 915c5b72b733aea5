"""Dark experience replay: a memory keeps images with the logits that the model gave for them, DER++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel

from ..scenarios import Task
from ..trainer import ContinualTrainer, Strategy, register_strategy
from ..trainer.strategy import cannot_combine, overrides
from .memory import MemoryStrategy, drawn, joined
from .settings import check_number


def logit_distance(logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Squared difference of logits (B, C) from those kept (B, C), which are NaN for classes not yet known: the mean
    over the classes known, then over images.

    It is eq. 5 of DER with the mean over classes in the place of the sum, as in the authors' code, whose alpha is of
    that size.
    """
    known = ~kept.isnan()
    squares = (logits - kept.nan_to_num()).square() * known
    return (squares.sum(-1) / known.sum(-1)).mean()


def widened(kept: torch.Tensor, rows: int, classes: int) -> torch.Tensor:
    """Kept logits (images, C) with room for more rows and classes, which are NaN; they themselves if there is room."""
    if len(kept) >= rows and kept.shape[1] >= classes:
        return kept
    wide = kept.new_full((max(rows, len(kept)), max(classes, kept.shape[1])), torch.nan)
    wide[: len(kept), : kept.shape[1]] = kept
    return wide


@register_strategy("der++")
class DarkExperienceReplay(MemoryStrategy):
    """Dark experience replay, DER++ (Buzzega et al. 2020, arXiv 2004.07211, eqs. 5-6).

    The memory takes images from the batches while they are learnt, by a reservoir over this stream (of all epochs),
    and with each image the logits that the model gave for it at that moment. Each step adds to the cross-entropy of
    the batch

        alpha |z - h(x)|^2  of images drawn from the memory with their logits z, over the classes there were then,
        + beta cross-entropy  of a second draw with its labels                                                 (eq. 6)

    `beta=0` is DER. Each draw has as many images as the batch. Logits are of the image as it was augmented then. The
    adapter needs `train_mask=False`. The trainer cannot be given a `loss` besides.

    Args:
        memory_size: images that the memory holds.
        alpha: weight of the distance of logits, 0 or more.
        beta: weight of the cross-entropy of replayed images, 0 or more.

    Raises:
        ValueError: a size below 1, or a negative weight.

    Example:
        >>> config = LinearProbeConfig(train_mask=False)                                    # doctest: +SKIP
        >>> ContinualTrainer(get_peft_model(base, config), args, scenario, processing_class=processor,
        ...                  strategy=[FineTuning(), DarkExperienceReplay(500)]).train()    # doctest: +SKIP
    """

    name = "DER++"
    trains_earlier_classes = True
    needs_places = True
    why_trained_head = "keeps logits of a head that is trained"

    def __init__(self, memory_size: int = 500, alpha: float = 0.1, beta: float = 0.5):
        super().__init__(memory_size)
        self.alpha = check_number("alpha", alpha, 0.1, least=0)
        self.beta = check_number("beta", beta, 0.5, least=0)
        self._empty()

    def _empty(self) -> None:
        #: (images, classes) in the order of the memory; NaN for classes that were not known.
        self.logits = torch.zeros(0, 0)
        #: Of the step under way: places and number of the batch's own images, and rows of the memory drawn for it.
        self._places: torch.Tensor | None = None
        self._own: int | None = None
        self._rows: list[int] = []

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "alpha": self.alpha, "beta": self.beta}

    def prepare(self, model: PeftModel) -> None:
        super().prepare(model)
        self._empty()

    def check_beside(self, others: Sequence[Strategy]) -> None:
        super().check_beside(others)
        for other in others:
            if overrides(other, "batch"):
                raise cannot_combine([self, other], "each puts images of its own into the batch")

    # ----------------------------------------------------------------------------------------------- a step

    def begin_task(self, trainer: ContinualTrainer, task: Task) -> None:
        """Lay out the memory, and the task as a whole, any image of which may come into it."""
        whole = trainer.strategy.tasks(trainer, task)
        earlier = [each for each in trainer.scenario[: task.index] if all(each is not other for other in whole)]
        self.store.lay_out(trainer, earlier, whole)

    def batch(self, trainer: ContinualTrainer, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch, then the draw for the logits, then the draw for the labels."""
        own = {name: value for name, value in inputs.items() if name != "place"}
        self._places, self._own, self._rows = inputs["place"], len(inputs["labels"]), []
        if not len(self.store):
            return own
        most = max(self._own, trainer.args.train_batch_size)
        for _ in range(2):
            self._rows += drawn(trainer, len(self.store), self._own, most)
        indices = self.store.indices_of(self.store.places[self._rows]).tolist()
        return joined(own, trainer.training_batch(self.store.examples, indices))

    def loss(self, logits, labels, class_names):
        """The cross-entropy of the batch's own images; what was drawn is in `losses`."""
        return F.cross_entropy(logits[: self._own], labels[: self._own])

    def losses(self, trainer, inputs, logits):
        own, logits, terms = self._own, logits.float(), {}
        if self._rows:
            kept = widened(self.logits[self._rows[:own]], own, logits.shape[1]).to(logits.device)
            terms = {
                "logit_replay": self.alpha * logit_distance(logits[own : 2 * own], kept),  # eq. 5
                "label_replay": self.beta * F.cross_entropy(logits[2 * own :], inputs["labels"][2 * own :]),  # eq. 6
            }
        self._take(trainer, self._places, logits[:own].detach())
        self._places, self._own, self._rows = None, None, []
        return terms

    def _take(self, trainer: ContinualTrainer, places: torch.Tensor, logits: torch.Tensor) -> None:
        """Let the images of all processes pass by the reservoir: the memory is the same on each of them."""
        if not trainer.weight_of_batch:  # another process's
            places = torch.full_like(places, -1)
        padded = (trainer.accelerator.pad_across_processes(each, pad_index=-1) for each in (places, logits))
        places, logits = (trainer.accelerator.gather(each).cpu() for each in padded)
        places, logits = places[places[:, 0] >= 0], logits[places[:, 0] >= 0]
        generator = np.random.default_rng([trainer.args.seed, self.store.seen])
        slots = self.store.stream(places.numpy(), generator)
        self.logits = widened(self.logits, len(self.store), logits.shape[1])
        for slot, row in zip(slots.tolist(), logits, strict=True):
            if slot >= 0:
                self.logits[slot] = row

    # ----------------------------------------------------------------------------------------------- keeping

    def end_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self.store.forget(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "logits": self.logits.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._empty()
        self.logits = state["logits"].clone()

    def kept_bytes(self, trainer: ContinualTrainer) -> dict[str, int]:
        known = int((~self.logits.isnan()).sum())
        return {**super().kept_bytes(trainer), "logits of the memory": known * self.logits.element_size()}
