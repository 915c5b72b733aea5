"""Learning without forgetting: the network before a task says what the old classes are to answer for its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from ..scenarios import Scenario, Task
from ..trainer import ContinualTrainer, Strategy, register_strategy
from .settings import check_number
from .teacher import Teacher, check_teacher


@register_strategy("lwf")
class LearningWithoutForgetting(Strategy):
    """LwF (Li and Hoiem 2016, arXiv 1606.09282, eqs. 2-4).

    No image and no importance is kept, but for the length of a task the network before it. The loss of a task gets

        (2)  strength * mean over its images of  - sum over old classes c of  p'_c log q'_c,
        (3)  p'_c, q'_c = p_c^(1/T) / sum over old classes of p^(1/T),  which is softmax(logits / T),

    p of that network and q of the one that learns. Where the task of an image is known at test (`task_incremental`),
    each old task has a softmax of its own, and their losses add up, as in the paper; elsewhere there is one over all
    old classes. In a task whose classes are all known (`domain_incremental`) all of them are old ones. In the first
    task nothing is added.

    The rest of the loss is the adapter's: with `train_mask=True` the cross-entropy over the new classes, as in the
    paper, with `train_mask=False` over all classes seen. The paper's warm-up of the new rows is left out. LwF.MC of
    the iCaRL paper (arXiv 1611.07725) is another form, with a sigmoid for each class.

    Args:
        strength: lambda_o, 0 or more.
        temperature: T, above 0; the paper's is 2. As there, the term is not multiplied by T^2.

    Raises:
        ValueError: settings out of range. In `check`: an adapter that renews rows with each task; see `check_teacher`.

    Example:
        >>> strategy = [FineTuning(), LearningWithoutForgetting()]         # doctest: +SKIP
    """

    name = "LwF"
    has_task_evidence = False
    learns_streams = False

    def __init__(self, strength: float = 1.0, temperature: float = 2.0):
        self.strength = check_number("strength", strength, 1, least=0)
        self.temperature = check_number("temperature", temperature, 2, above=0)
        self._forget_teacher()

    def _forget_teacher(self) -> None:
        self.teacher: Teacher | None = None
        #: Columns of the logits that a softmax is over, one entry for each softmax.
        self.old: list[torch.Tensor] = []

    def settings(self) -> dict[str, Any]:
        return {"strength": self.strength, "temperature": self.temperature}

    def check(self, model: PeftModel, scenario: Scenario) -> None:
        check_teacher(self.name, model, scenario)

    def prepare(self, model: PeftModel) -> None:
        self._forget_teacher()

    def begin_task(self, trainer: ContinualTrainer, task: Task) -> None:
        rows = trainer.tuner.head.rows_of_tasks(trainer.args.device)[:-1]
        if not len(rows) or not self.strength:
            return
        groups = rows if trainer.scenario.task_known else rows.any(0, keepdim=True)
        self.old = [group.nonzero()[:, 0] for group in groups]
        self.teacher = Teacher(trainer)

    def losses(self, trainer, inputs, logits):
        if self.teacher is None:
            return {}
        taught = self.teacher.logits(trainer, inputs)
        return {"lwf": self.strength * distillation(logits.float(), taught, self.old, self.temperature)}

    def end_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self._forget_teacher()


def distillation(
    logits: torch.Tensor, taught: torch.Tensor, groups: Sequence[torch.Tensor], temperature: float
) -> torch.Tensor:
    """The sum over groups of classes of the cross-entropy between two softened softmaxes, its mean over the batch.

    Args:
        logits: (B, classes) of the network that learns.
        taught: (B, classes) of the one that it is to answer like.
        groups: for each softmax the columns that it is over, (k,).
        temperature: T.
    """
    total = logits.new_zeros(())
    for columns in groups:
        target = (taught[:, columns] / temperature).softmax(-1)  # eq. 3, p'
        answer = (logits[:, columns] / temperature).log_softmax(-1)  # eq. 3, q'
        total = total - (target * answer).sum(-1).mean()  # eq. 2
    return total
