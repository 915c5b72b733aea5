"""The row that prompts have to beat: what the frozen model's features give on the same tasks, where they are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..heads import Head, Sizes, make_head
from ..heads.fusion import FusionHead
from ..scenarios import Task
from .examples import TaskExamples


if TYPE_CHECKING:
    from .trainer import ContinualTrainer


class WithoutPrompts:
    """LDA of the queries, or what a fused head has of them.

    Queries are features of the frozen model. They are kept where prompts are chosen by them and images are not
    augmented: no image is gone through for this row. Where a task's queries are not kept there is none.
    """

    def __init__(self) -> None:
        self.head: Head | None = None
        #: Tasks whose training images it has seen, by their index.
        self.learnt: set[int] = set()

    def learn(self, trainer: ContinualTrainer, tasks: Sequence[Task], examples: TaskExamples) -> None:
        """See what `tasks` were learnt from: their examples with their queries."""
        queries, classes = examples.tensors.get("query"), len(trainer.tuner.head.config.classes or ())
        if queries is None or trainer.tasks_before or not self._has_to_beat(trainer):
            return
        if self.head is None:
            self.head = self._new_head(queries.shape[1], 0)
        if len(tasks) > 1:  # all of them come again
            self.head.forget_observed()
        self.head.grow(classes, keep=self.head.classes)
        for part in torch.arange(len(queries)).split(1024):
            self.head.observe(queries[part], examples.tensors["model_label"][part])
        self.head.fit()
        self.learnt |= {task.index for task in tasks}

    @staticmethod
    def _has_to_beat(trainer: ContinualTrainer) -> bool:
        """Whether it is another row than the run's own, and no fused head has one already."""
        head = trainer.tuner.head.active
        is_own = trainer.tuner.pool.query_is_feature and head.observes
        return not is_own and not isinstance(head, FusionHead)

    def measure(self, trainer: ContinualTrainer, tasks: Sequence[Task]) -> dict[str, Any] | None:
        """The head's name and its accuracy on each of `tasks`; None where it does not know all of them."""
        own = trainer.tuner.head.active
        fused = isinstance(own, FusionHead)
        if not tasks or not (fused or self.learnt.issuperset(task.index for task in tasks)):
            return None
        # Of all tasks at once: each time the backbone is looked at, whether it is still the same.
        queries = trainer.kept_queries(tasks, "test") if trainer.args.cache_queries else None
        if queries is None:
            return None
        head, of_tasks = own.query if fused else self.head, queries.split([len(task.test) for task in tasks])
        accuracies = [self._accuracy(trainer, head, *each) for each in zip(tasks, of_tasks, strict=True)]
        return {"head": head.title, "accuracies": accuracies}

    @staticmethod
    @torch.no_grad()
    def _accuracy(trainer: ContinualTrainer, head: Head, task: Task, queries: torch.Tensor) -> float:
        device = next(head.buffers()).device
        logits = torch.cat([head(part.to(device)).cpu() for part in queries.split(1024)])
        if trainer.scenario.task_known:
            names = list(trainer.tuner.head.config.classes)
            outside = torch.ones(logits.shape[1], dtype=torch.bool)
            outside[[names.index(name) for name in task.classes]] = False
            logits[:, outside] = -torch.inf
        labels = torch.from_numpy(trainer.scenario.model_labels(task, "test", trainer.classes_before))
        return (logits.argmax(-1) == labels).double().mean().item()

    # ------------------------------------------------------------------------------------------------ going on

    def state(self) -> dict[str, Any]:
        """What a run that goes on needs of it."""
        if self.head is None:
            return {}
        sizes = {"width": self.head.width, "classes": self.head.classes}
        return {**sizes, "learnt": sorted(self.learnt), "sums": self.head.going_on()}

    def take(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; of runs of earlier versions there is nothing."""
        if not state:
            return
        self.head = self._new_head(state["width"], state["classes"])
        self.head.go_on(state["sums"])
        self.head.fit()
        self.learnt = set(state["learnt"])

    @staticmethod
    def _new_head(width: int, classes: int) -> Head:
        return make_head("lda", Sizes(width, width), classes, {}, "zeros")
