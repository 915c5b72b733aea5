"""Elastic weight consolidation: weights that earlier tasks need are held by a spring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel

from ..backbones.modes import without_autocast
from ..scenarios import Task
from ..scenarios.columns import check_flag
from ..trainer import ContinualTrainer, Strategy, register_strategy
from .settings import check_count, check_number


#: Of online EWC, where none is given.
DECAY = 0.95


@register_strategy("ewc")
class EWC(Strategy):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3), and its online form.

    The loss gets strength / 2 * sum over earlier tasks k and weights i of F_ki (w_i - w*_ki)^2, F_k the diagonal of
    the empirical Fisher information of task k at its end. The sum of parabolas is one parabola, so its curvature and
    centre are all that is kept, however many tasks there are.

    Online EWC (Schwarz et al. 2018, arXiv 1805.06370, section 4) lets earlier tasks fade: the curvature is
    F*_t = decay F*_{t-1} + F_t, and the centre is where the weights are after the latest task. There the penalty of
    the next task has the factor `decay` once more; here `strength` takes it in.

    On an adapter it holds what lasts from task to task: head, L2P's prompts, DualPrompt's general prompt; rows of one
    task are never changed by another. Keys are not held: which rows are nearest has no gradient, so the likelihood
    knows nothing of them.

    Do not expect it to stop forgetting in class-incremental learning. It holds the weights that tell a task's own
    classes apart, and no loss compares them with classes that come later. There it ends close to plain fine-tuning,
    whatever the strength (van de Ven and Tolias 2019, arXiv 1904.07734; van de Ven et al. 2022, Nature Machine
    Intelligence 4, "Three types of incremental learning"). It is made for task- and domain-incremental learning.

    Args:
        strength: lambda; 0 or more.
        fisher_samples: training images, one backward pass each, from which a task's Fisher information is estimated.
        online: whether earlier tasks fade.
        decay: gamma, what a task leaves of the Fisher information before it, from 0 to 1; for `online` alone.

    Raises:
        ValueError: a negative strength, no sample, a decay outside 0 to 1, or one that `online=False` has no use for.

    Example:
        >>> strategy = [FineTuning(), EWC(strength=1000.0)]                 # doctest: +SKIP
        >>> strategy = [FineTuning(), EWC(online=True, decay=0.9)]          # doctest: +SKIP
    """

    name = "EWC"
    has_task_evidence = False
    why_trained_head = "holds weights by the likelihood that a trained head gives"
    learns_streams = False

    def __init__(
        self, strength: float = 1000.0, fisher_samples: int = 256, online: bool = False, decay: float = DECAY
    ):
        self.strength = check_number("strength", strength, 1000, least=0)
        self.fisher_samples = check_count("fisher_samples", fisher_samples, 256)
        self.online = check_flag("online", online)
        self.decay = check_number("decay", decay, DECAY, least=0, most=1)
        if not online and decay != DECAY:
            raise ValueError(f"decay is {decay!r}, but without online=True nothing fades. Set online=True.")
        self.name = "online EWC" if online else "EWC"
        self.limits = (limit_of_holding(self.name),)
        #: By parameter, the parabola: sum of F_k, and sum of F_k w*_k over it; or online, F* and the latest weights.
        self.curvature: dict[str, torch.Tensor] = {}
        self.centre: dict[str, torch.Tensor] = {}

    def settings(self) -> dict[str, Any]:
        online = {"online": True, "decay": self.decay} if self.online else {}
        return {"strength": self.strength, "fisher_samples": self.fisher_samples, **online}

    def prepare(self, model: PeftModel) -> None:
        if not model.peft_config[model.active_adapter].tasks:  # an adapter that has learnt tasks may be held to them
            self.curvature, self.centre = {}, {}

    def losses(self, trainer, inputs, logits):
        if not self.curvature or not self.strength:
            return {}
        parameters = trainer.tuner.lasting_parameters()
        self._move(parameters)
        return {"ewc": self.strength / 2 * penalty(parameters, self.curvature, self.centre)}  # eq. 3

    def end_task(self, trainer: ContinualTrainer, task: Task) -> None:
        parameters = trainer.tuner.lasting_parameters()
        self._move(parameters)
        for name, fisher in self._fisher(trainer, task, parameters).items():
            value = parameters[name].detach().clone()
            if name not in self.curvature:
                self.curvature[name], self.centre[name] = fisher, value
            elif self.online:
                self.curvature[name] = padded(self.decay * self.curvature[name], fisher) + fisher
                self.centre[name] = value
            else:
                parabola = self.curvature[name], self.centre[name]
                self.curvature[name], self.centre[name] = sum_of_parabolas(*parabola, fisher, value)

    def _move(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """After an interruption they come back on the CPU."""
        for name, value in parameters.items():
            if name in self.curvature:
                self.curvature[name] = self.curvature[name].to(value.device)
                self.centre[name] = self.centre[name].to(value.device)

    def _fisher(
        self, trainer: ContinualTrainer, task: Task, parameters: dict[str, torch.nn.Parameter]
    ) -> dict[str, torch.Tensor]:
        """Mean of the squared gradients of log p(label | image), image by image; the same on every process. Parameters
        that the prediction does not depend on are left out."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        fisher = {name: torch.zeros_like(value) for name, value in parameters.items()}
        rows = torch.linspace(0, len(task.train) - 1, min(self.fisher_samples, len(task.train))).long()
        rows = torch.unique(rows).tolist()
        some = trainer.part_of(task, rows)
        model.eval()  # no dropout, and nothing is counted
        used = set()
        for batch in trainer.plain_batches(some, batch_size=1):
            with without_autocast(trainer.args.device):  # squares of small gradients
                logits = model(pixel_values=batch["pixel_values"]).logits
            # Over the classes that the training loss is over.
            loss = F.cross_entropy(trainer.tuner.head.mask(logits.float(), None, training=True), batch["labels"])
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    used.add(name)
                    fisher[name] += gradient.square() / len(rows)
        trainer.forget([some, task])
        return {name: value for name, value in fisher.items() if name in used}

    def state_dict(self) -> dict[str, Any]:
        return {"curvature": self.curvature, "centre": self.centre}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curvature, self.centre = state["curvature"], state["centre"]

    def kept_bytes(self, trainer: ContinualTrainer) -> dict[str, int]:
        """Online, the centre is what the model's own weights are between two tasks."""
        kept = [self.curvature] if self.online else [self.curvature, self.centre]
        return {"Fisher information": bytes_of(*kept)}


# --------------------------------------------------------------------------------------------------- parabolas


def penalty(
    values: Mapping[str, torch.Tensor], curvature: Mapping[str, torch.Tensor], centre: Mapping[str, torch.Tensor]
) -> torch.Tensor | float:
    """Sum of F (w - w*)^2 over all weights, by the parameters' names.

    A head has grown since: its first rows are those of the classes then, and the others are free. Parameters that
    `curvature` does not name are free too.
    """
    total = 0.0
    for name, value in values.items():
        if name in curvature:
            held = curvature[name]
            total = total + (held * (first_rows(value, held) - first_rows(centre[name], held)).square()).sum()
    return total


def sum_of_parabolas(
    curvature: torch.Tensor, centre: torch.Tensor, fisher: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Curvature and centre of the parabola that is the sum of two, but for a constant.

    Args:
        curvature: F of all tasks before, (rows, ...).
        centre: w* of all tasks before, in that shape.
        fisher: F_k of a task, (rows or more, ...); new classes' rows come last.
        value: w*_k of that task, in that shape.
    """
    known = padded(curvature, fisher)
    total = known + fisher
    weighted = known * padded(centre, fisher) + fisher * value
    # Where neither has curvature the centre is of no account.
    return total, torch.where(total > 0, weighted / total.clamp_min(1e-38), value)


def first_rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """As many rows of `values` as `like` has; numbers without rows (the scale of a cosine head) as they are."""
    return values[: len(like)] if like.ndim else values


def padded(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """As many rows as `like` has; those that `rows` lacks are 0."""
    if rows.shape == like.shape:
        return rows
    return torch.cat([rows, rows.new_zeros(len(like) - len(rows), *rows.shape[1:])])


def bytes_of(*states: Mapping[str, torch.Tensor]) -> int:
    """What the tensors take."""
    return sum(value.numel() * value.element_size() for state in states for value in state.values())


def limit_of_holding(name: str) -> str:
    """What a user of an adapter whose weights were held must know."""
    return (
        f"{name} holds weights; it does not learn to tell classes of different tasks apart. In class-incremental "
        "learning it forgets about as much as plain fine-tuning does: this is known of the method (arXiv 1904.07734), "
        "and no sign of a fault."
    )
