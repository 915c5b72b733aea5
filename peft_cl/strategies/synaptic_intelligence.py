"""Synaptic intelligence: weights are held that have brought the loss down on their way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast
from peft import PeftModel

from ..scenarios import Task
from ..trainer import ContinualTrainer, Strategy, register_strategy
from ..trainer.strategy import cannot_combine
from .ewc import EWC, bytes_of, first_rows, limit_of_holding, padded, penalty
from .gem import AGEM, GEM
from .settings import check_number


@register_strategy("si")
class SynapticIntelligence(Strategy):
    """SI (Zenke, Poole, Ganguli 2017, arXiv 1703.04200, eqs. 3-5).

    While a task is learnt, each weight adds up what its steps have taken from the loss,

        (3)  omega_i = - sum over steps of g_i (w_i after - w_i before),

    and after the task its importance grows by that, in proportion to the way that it went; in the next tasks it is
    held at where it is now:

        (4)  loss + strength * sum over i of Omega_i (w_i - w~_i)^2,
        (5)  Omega_i = sum over tasks of omega_i / (Delta_i^2 + damping).

    g is the gradient of an optimizer's step before it is clipped, without that of the penalty of eq. 4, and steps are
    those that the optimizer makes, momentum and weight decay included. An Omega below 0, which would push a weight
    away, is set to 0. Both are as in the authors' code; Avalanche leaves the penalty's gradient in g. It holds what
    `EWC` holds, and keys too, and needs no pass over the images: it learns the importance from the steps.

    As `EWC`, it does not stop forgetting in class-incremental learning (van de Ven and Tolias 2019, arXiv 1904.07734).

    Args:
        strength: c, 0 or more. The authors' code for CIFAR tries 0.01 and 0.1.
        damping: xi, above 0: the smaller, the more weights count that have hardly moved.

    Raises:
        ValueError: a negative strength, or a damping that is not above 0.

    Example:
        >>> strategy = [FineTuning(), SynapticIntelligence(strength=0.1)]               # doctest: +SKIP
    """

    name = "SI"
    has_task_evidence = False
    learns_streams = False
    limits = (limit_of_holding(name),)

    def __init__(self, strength: float = 0.1, damping: float = 0.001):
        self.strength = check_number("strength", strength, 0.1, least=0)
        self.damping = check_number("damping", damping, 0.001, above=0)
        #: Omega, by parameter; of a head, rows of the classes then.
        self.importance: dict[str, torch.Tensor] = {}
        self._leave_task()

    def _leave_task(self) -> None:
        #: Of the task under way: omega so far, and the weights at its beginning.
        self.path: dict[str, torch.Tensor] = {}
        self.start: dict[str, torch.Tensor] = {}
        #: Of the step under way: the gradient, and the weights before it.
        self._step: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def settings(self) -> dict[str, Any]:
        return {"strength": self.strength, "damping": self.damping}

    def check_beside(self, others: Sequence[Strategy]) -> None:
        for other in others:
            if isinstance(other, EWC):
                raise cannot_combine([self, other], "each pulls weights back to where they were")
            if isinstance(other, (GEM, AGEM)):
                raise cannot_combine(
                    [self, other], f"{other.name} turns the gradients from which {self.name} tells what steps bring"
                )

    def prepare(self, model: PeftModel) -> None:
        if not model.peft_config[model.active_adapter].tasks:  # an adapter that has learnt tasks may be held to them
            self.importance = {}
        self._leave_task()

    def begin_task(self, trainer: ContinualTrainer, task: Task) -> None:
        parameters = trainer.tuner.lasting_parameters()
        # New rows are each process's own until its model is wrapped, with those of the first.
        self.start = {name: broadcast(value.detach().clone()) for name, value in parameters.items()}
        self.path = {name: torch.zeros_like(value) for name, value in self.start.items()}
        for name in self.importance.keys() & parameters.keys():
            self.importance[name] = self.importance[name].to(parameters[name].device)

    def losses(self, trainer, inputs, logits):
        if not self.importance or not self.strength:
            return {}
        parameters = trainer.tuner.lasting_parameters()
        return {"si": self.strength * penalty(parameters, self.importance, self.start)}  # eq. 4

    @torch.no_grad()
    def after_backward(self, trainer: ContinualTrainer) -> None:
        scaler = trainer.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        for name, value in trainer.tuner.lasting_parameters().items():
            if value.grad is None:
                continue
            gradient = value.grad / scale
            if name in self.importance:
                own = penalty_gradient(value, self.importance[name], self.start[name])
                gradient -= padded(self.strength * own, gradient)
            self._step[name] = gradient, value.detach().clone()

    @torch.no_grad()
    def after_step(self, trainer: ContinualTrainer) -> None:
        parameters = trainer.tuner.lasting_parameters()
        if not trainer.accelerator.optimizer_step_was_skipped:  # with fp16, where a gradient was infinite
            for name, (gradient, before) in self._step.items():
                self.path[name] += path_of_step(gradient, before, parameters[name])
        self._step = {}

    @torch.no_grad()
    def end_task(self, trainer: ContinualTrainer, task: Task) -> None:
        parameters = trainer.tuner.lasting_parameters()
        for name, path in self.path.items():
            if name not in parameters:  # frozen at the task's end, as LoRA is after the first session
                continue
            before = padded(self.importance.get(name, torch.zeros_like(path)), path)
            self.importance[name] = importance_after(before, path, parameters[name] - self.start[name], self.damping)
        self._leave_task()

    def state_dict(self) -> dict[str, Any]:
        return {"importance": self.importance, "path": self.path, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # In the middle of a task they go where `begin_task` has put theirs.
        devices = {name: value.device for name, value in self.start.items()}
        for part in ("importance", "path", "start"):
            setattr(self, part, {name: value.to(devices.get(name, "cpu")) for name, value in state[part].items()})

    def kept_bytes(self, trainer: ContinualTrainer) -> dict[str, int]:
        return {"importance": bytes_of(self.importance)}


def path_of_step(gradient: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """What each weight's part of a step has taken from the loss, to first order."""
    return -gradient * (after - before)  # eq. 3


def importance_after(
    importance: torch.Tensor, path: torch.Tensor, change: torch.Tensor, damping: float
) -> torch.Tensor:
    """Omega after a task, from that before it, the task's omega and how far each weight has gone in it."""
    return (importance + path / (change.square() + damping)).clamp_min(0)  # eq. 5


def penalty_gradient(value: torch.Tensor, importance: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Gradient of the sum in eq. 4 by the rows that `importance` has."""
    return 2 * importance * (first_rows(value, importance) - first_rows(centre, importance))
