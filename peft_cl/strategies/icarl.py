"""iCaRL: exemplars chosen by herding, learnt with distillation, and the nearest mean of exemplars as classifier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel

from ..scenarios import Scenario, Task
from ..trainer import ContinualTrainer, Strategy, register_strategy
from ..trainer.examples import places_of
from ..trainer.strategy import cannot_combine
from .lwf import LearningWithoutForgetting
from .memory import MemoryStrategy
from .teacher import Teacher, check_teacher


def herd(features: torch.Tensor, count: int) -> torch.Tensor:
    """Rows of `count` images whose mean stays near that of all, in the order of choice (iCaRL, Alg. 4).

    Args:
        features: (images, F), of one class.
        count: images to choose; at most as many as there are.

    Example:
        >>> herd(torch.tensor([[0.0], [1.0], [5.0]]), 2)
        tensor([1, 2])
    """
    mean, total = features.mean(0), torch.zeros_like(features[0])
    left = torch.ones(len(features), dtype=torch.bool, device=features.device)
    order = []
    for number in range(1, min(count, len(features)) + 1):
        distance = (mean - (features + total) / number).norm(dim=-1)  # Alg. 4, line 3
        chosen = int(distance.masked_fill(~left, torch.inf).argmin())
        order.append(chosen)
        left[chosen], total = False, total + features[chosen]
    return torch.tensor(order, dtype=torch.int64)


def sigmoid_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy summed over classes, mean over images (iCaRL, Alg. 3); both (B, classes)."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)


@register_strategy("icarl")
class ICaRL(MemoryStrategy):
    """Incremental classifier and representation learning, iCaRL (Rebuffi et al. 2017, arXiv 1611.07725, Algs. 1-5).

    Each task is learnt from its own images and the exemplars of all earlier classes together. The loss is the binary
    cross-entropy of the new classes' sigmoid outputs, and that of the old classes' outputs with those of the network
    before the task as targets. After the task each class seen has memory_size / classes exemplars, those of new
    classes by herding. An image's class is that of the nearest mean of exemplars: the head `"ncm"`, which observes the
    exemplars alone. While a task is under way, it observes all images of the new classes.

    The adapter's configuration must have `head="ncm"` with `head_options={"metric": "cosine", "normalize": True}`
    (means of features of length 1, as in Alg. 1) and `train_mask=False`. As in the paper it trains the whole backbone
    beside `FineTuning`; alone it trains the adapter. The trainer cannot be given a `loss` besides.

    Args:
        memory_size: K, exemplars of all classes together; at least as many as there are classes.

    Raises:
        ValueError: a size below 1; an adapter or a scenario that the method is not defined for.

    Example:
        >>> config = LinearProbeConfig(                                                     # doctest: +SKIP
        ...     head="ncm", head_options={"metric": "cosine", "normalize": True}, head_features="cls", train_mask=False
        ... )
        >>> ContinualTrainer(get_peft_model(base, config), args, scenario, processing_class=processor,
        ...                  strategy=[FineTuning(), ICaRL(2000)]).train()                  # doctest: +SKIP
    """

    name = "iCaRL"
    trains_earlier_classes = True

    def __init__(self, memory_size: int = 2000):
        super().__init__(memory_size)
        self._begin((), None)

    def _begin(self, new_classes: Sequence[str], teacher: Teacher | None) -> None:
        #: Of the task under way: names of its classes, and the network before it (None in the first).
        self._new, self._teacher = frozenset(new_classes), teacher

    def check_beside(self, others: Sequence[Strategy]) -> None:
        super().check_beside(others)
        for other in others:
            if isinstance(other, LearningWithoutForgetting):
                raise cannot_combine([self, other], "each distils from the network before a task")

    def check(self, model: PeftModel, scenario: Scenario) -> None:
        check_teacher(self.name, model, scenario)
        config = model.peft_config[model.active_adapter]
        metric, normalize = config.head_options.get("metric"), config.head_options.get("normalize")
        if config.head != "ncm" or metric != "cosine" or not normalize or config.head_features not in (None, "cls"):
            raise ValueError(
                f"head is {config.head!r} with head_options={config.head_options!r} and head_features="
                f"{config.head_features!r}, but {self.name} classifies by the nearest mean of exemplars. Set "
                "these in the adapter's configuration: head 'ncm', head_options {'metric': 'cosine', 'normalize': "
                "True}, head_features 'cls'."
            )
        if config.tasks:
            raise ValueError(
                f"The adapter has learnt {config.num_tasks} tasks, of whose classes {self.name} has no exemplars. "
                "Start with a new adapter."
            )
        names = [name for task in scenario for name in task.classes]
        if len(set(names)) < len(names):
            raise ValueError(
                f"The scenario {scenario.name!r} brings classes again in later tasks, but {self.name} learns each "
                "class once. Use class_incremental(...), or ExperienceReplay() in place of it."
            )
        if self.memory_size < len(names):
            raise ValueError(
                f"memory_size is {self.memory_size}, but must be at least the number of classes, {len(names)}: each "
                f"needs an exemplar. Give one such as {20 * len(names)}."
            )

    def prepare(self, model: PeftModel) -> None:
        super().prepare(model)
        self._begin((), None)

    # ----------------------------------------------------------------------------------------------- learning

    def tasks(self, trainer: ContinualTrainer, task: Task) -> Sequence[Task]:
        return [task, *self.store.parts]  # Alg. 3, line 1

    def begin_task(self, trainer: ContinualTrainer, task: Task) -> None:
        super().begin_task(trainer, task)
        self._begin(task.classes, Teacher(trainer) if task.index else None)

    def loss(self, logits, labels, class_names):
        """The new classes' part of Alg. 3."""
        new = [row for row, name in enumerate(class_names) if name in self._new]
        return sigmoid_loss(logits[:, new], F.one_hot(labels, logits.shape[1])[:, new].to(logits))

    def losses(self, trainer, inputs, logits):
        """The old classes' part of Alg. 3."""
        if self._teacher is None:
            return {}
        old = [row for row, name in enumerate(trainer.tuner.head.config.classes) if name not in self._new]
        before = self._teacher.logits(trainer, inputs)[:, old].sigmoid()  # q
        return {"distillation": sigmoid_loss(logits[:, old].float(), before)}

    # ----------------------------------------------------------------------------------------------- exemplars

    def end_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self.store.forget(trainer)
        self.store.places = self._exemplars(trainer, task)
        trainer.forget([task])
        self.store.lay_out(trainer, trainer.scenario[: task.index + 1])
        self._begin((), None)

    def _exemplars(self, trainer: ContinualTrainer, task: Task) -> np.ndarray:
        """Places (images, 2) of the exemplars of all classes seen, those of a class in the order of choice."""
        count = self.memory_size // len(trainer.tuner.head.config.classes)  # Alg. 2, line 3
        places, labels = self.store.places, self.store.labels(trainer, self.store.places)
        kept = [places[labels == label][:count] for label in np.unique(labels)]  # Alg. 5
        features = F.normalize(trainer.features_of_all(task).double(), dim=-1)
        new, labels = places_of(task), self.store.labels(trainer, places_of(task))
        for label in np.unique(labels):
            own = np.flatnonzero(labels == label)
            kept.append(new[own[herd(features[own], count).numpy()]])  # Alg. 4
        return np.concatenate(kept)

    def observed(self, trainer: ContinualTrainer, task: Task) -> Sequence[Task]:
        is_under_way = self._new.issuperset(task.classes)
        return [*self.store.parts, task] if is_under_way else self.store.parts  # Alg. 1
