"""Nearest class mean on frozen features: no training at all, and often hard to beat."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel

from ..scenarios import Task
from ..scenarios.columns import check_flag
from ..trainer import ContinualTrainer, Strategy


class NearestClassMean(Strategy):
    """Classify by the nearest mean of the training features of each class (Janson et al. 2022, arXiv 2210.04428).

    The nearest mean in Euclidean distance is a linear head: |f - m|^2 = |f|^2 - 2 (f m - |m|^2 / 2), so the class's
    row is m and its bias -|m|^2 / 2. With `cosine=True` the row is m / |m| and the bias 0. Use it on a linear probe:
    `get_peft_model(model, LinearProbeConfig())`; the result is saved and loaded like any adapter.

    Args:
        cosine: compare directions instead of distances.

    Raises:
        ValueError: `cosine` is neither True nor False.
    """

    name = "Nearest class mean"
    has_task_evidence = False

    def __init__(self, cosine: bool = False):
        self.cosine = check_flag("cosine", cosine)
        #: Of all images so far, by class name: a class may come again in another domain.
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def settings(self) -> dict[str, Any]:
        return {"cosine": self.cosine} if self.cosine else {}

    def title(self, adapter: str) -> str:
        return self.name

    def prepare(self, model: PeftModel) -> None:
        if not model.base_model.pool.query_is_feature:
            raise ValueError(
                f"{self.name} compares features of the frozen model, but {type(model.base_model).__name__} classifies "
                "features that its prompts have changed. Use it on a linear probe: LinearProbeConfig()."
            )
        if not model.peft_config[model.active_adapter].tasks:  # one that has learnt tasks may learn on
            self.sums, self.counts = {}, {}

    @torch.no_grad()
    def learn(self, trainer: ContinualTrainer, task: Task) -> Any:
        tuner = trainer.tuner
        head = tuner.head.active
        sums = torch.zeros_like(head.weight)
        counts = torch.zeros(head.out_features, device=head.weight.device)
        # All examples on every process: each then has the same means, of every image once.
        for batch in trainer.plain_batches(task):
            features = tuner.query(batch["pixel_values"]).float()
            sums.index_add_(0, batch["labels"], features)
            counts.index_add_(0, batch["labels"], torch.ones_like(batch["labels"], dtype=counts.dtype))
        trainer.forget([task])
        for row, name in enumerate(head.config.classes):
            if counts[row]:
                self.sums[name] = sums[row] + (self.sums[name].to(sums) if name in self.sums else 0)
                self.counts[name] = self.counts.get(name, 0) + int(counts[row])
            if name in self.counts:
                mean = self.sums[name].to(sums) / self.counts[name]
                head.weight[row] = F.normalize(mean, dim=-1) if self.cosine else mean
                head.bias[row] = 0.0 if self.cosine else -mean.square().sum() / 2
            elif name in trainer.scenario.classes:  # of a stream, and not seen yet: out of the question
                head.bias[row] = -1e4

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.counts = state["sums"], state["counts"]
