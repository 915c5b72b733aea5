"""Experience replay: a small memory of earlier training images is mixed into every batch."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from ..trainer import ContinualTrainer, register_strategy
from .memory import MemoryStrategy, drawn, joined
from .settings import check_count


#: How the memory may be filled.
RULES = ("reservoir", "balanced")


@register_strategy("er")
class ExperienceReplay(MemoryStrategy):
    """Experience replay, ER (Chaudhry et al. 2019, arXiv 1902.10486).

    Each step trains on the batch and as many images drawn from the memory. The memory is brought up to date at the end
    of each task; it holds places in the data sets, not copies. The adapter needs `train_mask=False`. DualPrompt's key
    of a task is pulled to the replayed queries too, so that rows are told apart less well at test.

    Args:
        memory_size: Images that the memory holds.
        replay_batch_size: Images drawn for each device's batch; None: as many as the batch has.
        memory: `"reservoir"`, a uniform sample of all training images seen (Vitter 1985), or `"balanced"`, as many
            images of each class seen.

    Raises:
        ValueError: sizes below 1, or a memory of another kind.

    Example:
        >>> config = L2PConfig(train_mask=False)                                            # doctest: +SKIP
        >>> model = get_peft_model(base, config)                                            # doctest: +SKIP
        >>> ContinualTrainer(model, args, scenario, processing_class=processor,
        ...                  strategy=ExperienceReplay(500, memory="balanced")).train()     # doctest: +SKIP
    """

    name = "ER"
    trains_earlier_classes = True

    def __init__(
        self,
        memory_size: int = 500,
        replay_batch_size: int | None = None,
        memory: Literal["reservoir", "balanced"] = "reservoir",
    ):
        if memory not in RULES:
            raise ValueError(
                f"memory is {memory!r}, but must be one of {', '.join(map(repr, RULES))}. Give one of them."
            )
        super().__init__(memory_size, memory)
        self.replay_batch_size = check_count("replay_batch_size", replay_batch_size, 32, or_none=True)

    @property
    def memory(self) -> np.ndarray:
        """Task and row of each image in memory, int64 (images, 2)."""
        return self.store.places

    @property
    def seen(self) -> int:
        """Images there were to choose from."""
        return self.store.seen

    def settings(self) -> dict[str, Any]:
        own = {**super().settings(), "replay_batch_size": self.replay_batch_size}
        # Runs of earlier versions had no other.
        return own if self.store.rule == "reservoir" else {**own, "memory": self.store.rule}

    def batch(self, trainer: ContinualTrainer, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        examples = self.store.examples
        if examples is None:
            return inputs
        count = self.replay_batch_size or len(inputs["labels"])
        most = self.replay_batch_size or max(count, trainer.args.train_batch_size)
        return joined(inputs, trainer.training_batch(examples, drawn(trainer, len(examples), count, most)))
