"""Elastic weight consolidation: weights that earlier tasks need are held by a spring."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel

from ..scenarios import Task
from ..scenarios.columns import is_count, is_number, plain
from ..trainer import ContinualTrainer, Strategy


class EWC(Strategy):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3).

    The loss gets strength / 2 * sum over earlier tasks k and weights i of F_ki (w_i - w*_ki)^2, F_k the diagonal of
    the empirical Fisher information of task k at its end. The sum of parabolas is one parabola, so its curvature and
    centre are all that is kept, however many tasks there are. On an adapter it holds what lasts from task to task:
    head, L2P's prompts, DualPrompt's general prompt; rows of one task are never changed by another. Keys are not held:
    which rows are nearest has no gradient, so the likelihood knows nothing of them.

    Args:
        strength: lambda; 0 or more.
        fisher_samples: training images, one backward pass each, from which a task's Fisher information is estimated.

    Raises:
        ValueError: a negative strength, or no sample.
    """

    name = "EWC"
    has_task_evidence = False
    why_trained_head = "holds weights by the likelihood that a trained head gives"
    learns_streams = False

    def __init__(self, strength: float = 1000.0, fisher_samples: int = 256):
        if not is_number(strength) or not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength!r}, but must be a number of at least 0. Give one such as 1000.")
        if not is_count(fisher_samples):
            raise ValueError(
                f"fisher_samples is {fisher_samples!r}, but must be a whole number of at least 1. Give one such as "
                "256."
            )
        self.strength = plain(strength)
        self.fisher_samples = plain(fisher_samples)
        #: By parameter: sum of F_k, and sum of F_k w*_k over it.
        self.curvature: dict[str, torch.Tensor] = {}
        self.centre: dict[str, torch.Tensor] = {}

    def settings(self) -> dict[str, Any]:
        return {"strength": self.strength, "fisher_samples": self.fisher_samples}

    def prepare(self, model: PeftModel) -> None:
        if not model.peft_config[model.active_adapter].tasks:  # an adapter that has learnt tasks may be held to them
            self.curvature, self.centre = {}, {}

    def losses(self, trainer, inputs, logits):
        if not self.curvature or not self.strength:
            return {}
        penalty = 0.0
        for name, value in trainer.tuner.lasting_parameters().items():
            if name in self.curvature:
                self._move(name, value.device)
                # A head has grown since: its first rows are those of the classes then.
                held = value[: len(self.centre[name])]
                penalty = penalty + (self.curvature[name] * (held - self.centre[name]).square()).sum()
        return {"ewc": self.strength / 2 * penalty}

    def end_task(self, trainer: ContinualTrainer, task: Task) -> None:
        parameters = trainer.tuner.lasting_parameters()
        for name, fisher in self._fisher(trainer, task, parameters).items():
            value = parameters[name].detach()
            if name in self.curvature:
                self._move(name, value.device)
            known = self.curvature.get(name)
            if known is None:
                self.curvature[name], self.centre[name] = fisher, value.clone()
                continue
            rows = len(known)
            total, centre = fisher.clone(), value.clone()
            total[:rows] += known
            weighted = known * self.centre[name] + fisher[:rows] * value[:rows]
            # Where neither task has curvature the centre is of no account.
            centre[:rows] = torch.where(total[:rows] > 0, weighted / total[:rows].clamp_min(1e-38), value[:rows])
            self.curvature[name], self.centre[name] = total, centre

    def _move(self, name: str, device: torch.device) -> None:
        """After an interruption they come back on the CPU."""
        self.curvature[name] = self.curvature[name].to(device)
        self.centre[name] = self.centre[name].to(device)

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
            with torch.autocast(trainer.args.device.type, enabled=False):  # squares of small gradients
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
