"""The point at which a comparison method enters the trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftModel

from ..scenarios import Task


if TYPE_CHECKING:
    from .trainer import ContinualTrainer


class Strategy:
    """How one task is learnt. The default is gradient descent on the task's own examples.

    A comparison method overrides what it does differently and nothing else.
    """

    #: Name in tables; None: the name of the adapter's method.
    name: str | None = None

    def prepare(self, model: PeftModel) -> None:
        """Change the model once, before the first task (unfreeze weights, for instance)."""

    def learn(self, trainer: ContinualTrainer, task: Task) -> Any:
        """Learn `task`, whose classes the model's head has by now. Default: the trainer's own training loop."""
        return trainer.fit(task)

    def saved_bytes(self, trainer: ContinualTrainer, adapter_bytes: int) -> int:
        """Bytes that must be kept to use what was learnt. Default: the adapter's file."""
        return adapter_bytes
