"""What methods have in common that give each task weights or units of its own, which later tasks leave as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from ..heads.linear import TrainedRows
from ..scenarios import Scenario
from ..scenarios.columns import is_count
from ..trainer import ContinualTrainer, Strategy
from ..trainer.strategy import cannot_combine
from ..tuners.base.encoder import PromptedEncoder
from ..tuners.base.model import PromptPoolModel
from .ewc import EWC
from .lwf import LearningWithoutForgetting
from .memory import MemoryStrategy
from .synaptic_intelligence import SynapticIntelligence


class Isolating(Strategy):
    """A method under which a later task never changes what an earlier task uses.

    It trains the whole backbone (`strategy=[FineTuning(), ...]`) on a scenario that tells the task of a test image.
    A subclass says by `shares` how much of a step each weight takes; here the optimizer is held to it.

    Attributes:
        tasks_known: how many of the adapter's tasks the strategy has learnt, or begun to learn.
    """

    has_task_evidence = False
    learns_streams = False
    why_trained_head = "keeps the rows of the head of each task apart"
    tasks_known = 0

    def __init__(self):
        #: Of the step under way: a parameter, what it was before, and its share of the step.
        self._held: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []

    def forget(self) -> None:
        """Forget what an earlier run left in the strategy."""
        raise NotImplementedError(f"{type(self).__name__} must define forget()")

    def check_beside(self, others: Sequence[Strategy]) -> None:
        """Refuse methods that keep or hold what is kept already, by the network of the newest task."""
        for other in others:
            if isinstance(other, (EWC, Isolating, LearningWithoutForgetting, MemoryStrategy, SynapticIntelligence)):
                raise cannot_combine(
                    [self, other], f"under {self.name} later tasks never change what earlier ones use"
                )

    def check(self, model: PeftModel, scenario: Scenario) -> None:
        tuner, config = model.base_model, model.peft_config[model.active_adapter]
        if not scenario.task_known:
            raise ValueError(
                f"The scenario {scenario.name!r} does not tell the task of a test image (task_known is False), but "
                f"{self.name} has one network for each task. Use task_incremental(...), in a configuration "
                "scenario.kind task-incremental."
            )
        classes = [name for task in scenario for name in task.classes]
        twice = next((name for name in scenario.classes if classes.count(name) > 1), None)
        if twice is not None:
            raise ValueError(
                f"The class {twice!r} is in more than one task, but under {self.name} each task has its own rows of "
                "the head. Divide the classes over the tasks, as task_incremental(...) does."
            )
        if not config.train_mask:
            raise ValueError(
                f"train_mask is False, but {self.name} keeps the rows of the head of earlier tasks fixed, so the loss "
                "must be over the task's own classes. Set train_mask=True."
            )
        if not tuner.pool.query_is_feature or not isinstance(tuner.head.active, TrainedRows):
            raise ValueError(
                f"The adapter is {type(tuner).__name__} with head={config.head!r}, but {self.name} divides the "
                "backbone's weights and needs a trained head alone. Use LinearProbeConfig(head='linear')."
            )
        learnt = config.num_tasks if config.tasks else 0
        if learnt and learnt != self.tasks_known:
            raise ValueError(
                f"The adapter has learnt {learnt} tasks and this {self.name} {self.tasks_known}, so what those tasks "
                f"use is not known. Give the {self.name} that they were learnt with, or a new adapter."
            )

    def prepare(self, model: PeftModel) -> None:
        tuner, config = model.base_model, model.peft_config[model.active_adapter]
        if not all(weight.requires_grad for weight in tuner.encoder.base_layer.parameters()):
            raise ValueError(
                f"The backbone is frozen, but {self.name} divides its weights among the tasks. Train it by "
                f"strategy=[FineTuning(), {type(self).__name__}()]."
            )
        self._held = []
        if not config.tasks:  # an adapter that has learnt tasks may learn on
            self.forget()

    def shares(self, trainer: ContinualTrainer) -> dict[nn.Parameter, torch.Tensor]:
        """How much of each step the weights take, from 0 (fixed) to 1 (free): tensors that broadcast to the parameter.

        Parameters that are left out are free. Here: after the first task, the backbone is fixed, and of the head all
        but the rows of the present task.
        """
        tuner = trainer.tuner
        if tuner.head.config.num_tasks == 1:
            return {}
        device = trainer.args.device
        none = torch.zeros((), device=device)
        shares = dict.fromkeys(tuner.encoder.base_layer.parameters(), none)
        own = tuner.head.rows_of_tasks(device)[-1]
        head: TrainedRows = tuner.head.active
        for name, value in head.named_parameters():
            shares[value] = own.view(-1, *[1] * (value.ndim - 1)) if name in head.row_names else none
        return shares

    def after_backward(self, trainer: ContinualTrainer) -> None:
        self._held = []
        for parameter, share in self.shares(trainer).items():
            self._held.append((parameter, parameter.detach().clone(), share))
            if parameter.grad is not None:  # what does not move has no part in the norm by which gradients are clipped
                parameter.grad.masked_fill_(share == 0, 0.0)

    @torch.no_grad()
    def after_step(self, trainer: ContinualTrainer) -> None:
        """Undo what the optimizer did beyond the shares: weight decay and momentum need no gradient."""
        for parameter, before, share in self._held:
            parameter.copy_(limited(before, parameter, share))
        self._held = []


def limited(before: torch.Tensor, after: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """`before` + `share` * (`after` - `before`): to the bit `before` where the share is 0, `after` where it is 1."""
    return torch.lerp(before, after, share.to(after.dtype))


def encoder_of(model: PeftModel) -> PromptedEncoder:
    """The encoder of a model with an adapter of this library.

    Raises:
        ValueError: it has none.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, PromptPoolModel):
        raise ValueError(
            f"model is a {type(model).__name__}, but must be a saved adapter on its backbone. Load it by "
            "AutoPeftModel.from_pretrained(folder)."
        )
    return tuner.encoder


def read_beside(folder: str | Path, file: str, method: str) -> dict[str, torch.Tensor]:
    """The tensors that a method's `save` wrote into the folder of an adapter.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(folder) / file
    if not path.is_file():
        raise ValueError(
            f"folder is {str(folder)!r}, but has no {file}, which {method} writes beside an adapter. Give the folder "
            "of an adapter that was trained with it, on this machine."
        )
    return load_file(path)


def check_task(encoder: PromptedEncoder, task: int, tasks: int) -> None:
    """Refuse a task that was not learnt, and a second one in the same model: what the first does not see is gone.

    Raises:
        ValueError: so it is.
    """
    if not is_count(task, 0) or task >= tasks:
        raise ValueError(f"task is {task!r}, but must be a whole number from 0 to {tasks - 1}. Give one such as 0.")
    other = getattr(encoder.base_layer, "only_task", None)
    if other is not None:
        raise ValueError(
            f"task is {task}, but the model was reduced to the network of task {other}, and the others are gone. Load "
            "the model anew for each task."
        )
    encoder.base_layer.only_task = task
