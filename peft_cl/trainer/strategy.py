"""The point at which a comparison method enters the trainer."""

from __future__ import annotations

from pathlib import Path
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

    #: What users of the saved adapter must know, for its card.
    limits: tuple[str, ...] = ()

    #: Whether a task is learnt by training steps on frozen features, from which task evidence takes its means.
    has_task_evidence = True

    def prepare(self, model: PeftModel) -> None:
        """Change the model once, before the first task (unfreeze weights, for instance)."""

    def learn(self, trainer: ContinualTrainer, task: Task) -> Any:
        """Learn `task`, whose classes the model's head has by now. Default: the trainer's own training loop."""
        return trainer.fit(task)

    def state_dict(self) -> dict[str, Any]:
        """What the strategy keeps from task to task: tensors, numbers, text, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def save(self, trainer: ContinualTrainer, folder: Path) -> None:
        """Write what the adapter's file does not hold into its folder, after each task (on the first process)."""

    def saved_bytes(self, trainer: ContinualTrainer, adapter_bytes: int) -> int:
        """Bytes that must be kept to use what was learnt. Default: the adapter's file."""
        return adapter_bytes
