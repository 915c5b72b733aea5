"""Joint training: every task is learnt together with all before it, the upper bound of continual learning."""

from __future__ import annotations

from collections.abc import Sequence

from ..scenarios import Task
from ..trainer import ContinualTrainer, Strategy, register_strategy


@register_strategy("joint")
class JointTraining(Strategy):
    """At each task, train on the examples of all tasks so far, from the weights of the task before ("cumulative").

    It keeps all data, which continual learning may not: what it reaches is what the others are measured against (the
    reference of intransigence). The adapter needs `train_mask=False`.
    """

    name = "joint training"
    trains_earlier_classes = True
    has_task_evidence = False
    learns_streams = False

    def tasks(self, trainer: ContinualTrainer, task: Task) -> Sequence[Task]:
        return trainer.scenario[: task.index + 1]
