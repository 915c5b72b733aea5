"""Orthogonal subspace fine-tuning, by PEFT: each task leaves the main singular directions of the weights alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peft import OSFConfig, PeftModel
from peft.tuners.osf import OSFModel
from torch import nn

from ..scenarios import Scenario, Task
from ..scenarios.columns import is_count, is_number, plain
from ..trainer import ContinualTrainer, Strategy, register_strategy
from ..trainer.strategy import cannot_combine
from ..tuners.base.merged import layers_of_others
from .ewc import EWC
from .fine_tuning import FineTuning, check_probe, unfreeze
from .lora import ALL_LINEAR, check_targets, targets_in
from .synaptic_intelligence import SynapticIntelligence


def preserved_rank(width: int, task: int, effective_rank: float, rank_growth: float) -> int:
    """How many singular directions of a matrix are preserved in task `task` (from 0): at least one, not all.

    Args:
        width: the matrix's smaller side.
        effective_rank, rank_growth: whole numbers are directions, others fractions of `width`.

    Example:
        >>> [preserved_rank(768, task, 0.5, 0.05) for task in (0, 1, 2, 99)]
        [384, 422, 460, 767]
    """

    def directions(share: float) -> float:
        return width * share if isinstance(share, float) else share

    return min(max(int(directions(effective_rank) + task * directions(rank_growth)), 1), width - 1)


@register_strategy("osf")
class OSF(FineTuning):
    """Orthogonal subspace fine-tuning (Nayak et al. 2025, arXiv 2504.07097), in the layers of PEFT (`OSFConfig`).

    At a task's start each weight is decomposed, W = U_high S_high V_high + U_low S_low V_low. The part of the largest
    singular values is preserved; the rest is trained, by gradients from which the part along U_high and V_high is
    taken out. At its end the result is the new W, and in the next task more directions are preserved. The paper gives
    each layer a number of directions by its importance; PEFT, and so this, gives all of them the same share.

    The step is orthogonal to what is preserved if the optimizer takes gradients as they are (`optim="sgd"`). Adam
    divides each number of a gradient by a size of its own afterwards, which brings some of that part back, in PEFT as
    here: on a small network a sixth of the change was along the preserved directions after 100 steps.

    Use it on a linear probe with the plain cross-entropy over all classes seen: `LinearProbeConfig(train_mask=False)`.
    A head that is computed from features is refused: they change with each task. The trained backbone is saved as
    `FineTuning` saves it, and between tasks `disable_adapter()` gives it with the base model's own classifier.

    Args:
        effective_rank: directions that are preserved in the first task: a fraction of a weight's smaller side, above 0
            and below 1, or a whole number of at least 1.
        rank_growth: by how much that grows with each task, in the same forms, or 0. One direction always remains to
            be trained.
        target_modules: as `SequentialLoRA` has it; the layers must be linear.

    Raises:
        ValueError: another value; later, a backbone without such layers, a quantised or divided one or one that is
            not float32, or an adapter with prompts.

    Example:
        >>> model = get_peft_model(base, LinearProbeConfig(train_mask=False))         # doctest: +SKIP
        >>> trainer = ContinualTrainer(model, ..., strategy=OSF(effective_rank=0.5))  # doctest: +SKIP
    """

    name = "OSF"
    learns_streams = False

    def __init__(
        self,
        effective_rank: float = 0.5,
        rank_growth: float = 0.05,
        target_modules: Sequence[str] | str | None = ALL_LINEAR,
    ):
        for name, value, least, remedy in (
            ("effective_rank", effective_rank, 1, 0.5),
            ("rank_growth", rank_growth, 0, 0.05),
        ):
            is_fraction = is_number(value) and not is_count(value, 0) and 0 < value < 1
            if not is_fraction and not is_count(value, least):
                raise ValueError(
                    f"{name} is {value!r}, but must be a fraction above 0 and below 1, or a whole number of at least "
                    f"{least}. Give one such as {remedy}."
                )
        self.effective_rank, self.rank_growth = plain(effective_rank), plain(rank_growth)
        self.target_modules = check_targets(target_modules)
        self._targets: list[str] = []
        self._layers: OSFModel | None = None

    def settings(self) -> dict[str, Any]:
        return {
            "effective_rank": self.effective_rank,
            "rank_growth": self.rank_growth,
            "target_modules": self.target_modules,
        }

    def check_beside(self, others: Sequence[Strategy]) -> None:
        for other in others:
            if isinstance(other, (EWC, SynapticIntelligence)):
                raise cannot_combine(
                    [self, other], f"{self.name} trains other parameters in each task, and {other.name} holds the same"
                )

    def check(self, model: PeftModel, scenario: Scenario) -> None:
        check_probe(self.name, model)
        backbone = model.base_model.encoder.base_layer
        layers = layers_of_others(backbone)
        if layers:
            raise ValueError(
                f"The backbone has {len(layers)} layers of {type(next(iter(layers.values()))).__name__} in it, but "
                f"{self.name} decomposes its weights. Load it anew."
            )
        other = [name for name in targets_in(self.target_modules, model) if not _is_linear(backbone, name)]
        if other:
            raise ValueError(
                f"target_modules names {other[0]!r}, which is no linear layer, but {self.name} decomposes matrices. "
                f"Name linear layers, or give target_modules={ALL_LINEAR!r}."
            )

    def prepare(self, model: PeftModel) -> None:
        """Between tasks the weights themselves are what is trained: they belong to the state of a run."""
        self._targets, self._layers = targets_in(self.target_modules, model), None
        self._unfreeze(model.base_model.encoder.base_layer)

    def _unfreeze(self, backbone: nn.Module) -> None:
        unfreeze(self.name, (backbone.get_submodule(name).weight for name in self._targets))

    def begin_task(self, trainer: ContinualTrainer, task: Task) -> None:
        tuner = trainer.tuner
        backbone, number = tuner.encoder.base_layer, trainer.tasks_before + task.index
        ranks = {
            f"^{re.escape(name)}$": preserved_rank(
                min(backbone.get_submodule(name).weight.shape), number, self.effective_rank, self.rank_growth
            )
            for name in self._targets
        }
        config = OSFConfig(target_modules=self._targets, rank_pattern=ranks)
        self._layers = OSFModel(backbone, config, tuner.active_adapters[0])

    def end_task(self, trainer: ContinualTrainer, task: Task) -> None:
        """Not PEFT's `unload()` alone: that gives back the weights of the task's start."""
        self._unfreeze(self._layers.merge_and_unload())
        self._layers = None


def _is_linear(backbone: nn.Module, name: str) -> bool:
    return isinstance(backbone.get_submodule(name), nn.Linear)
