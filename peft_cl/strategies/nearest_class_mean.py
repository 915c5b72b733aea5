"""Nearest class mean on frozen features: no training at all, and often hard to beat."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel

from ..heads import ClassMeansHead, LinearHead, Sizes
from ..scenarios import Task
from ..scenarios.columns import check_flag
from ..trainer import ContinualTrainer, Strategy, register_strategy


#: Of a class of a stream that was not seen yet, which is out of the question.
UNSEEN = -1e4


@register_strategy("nearest-class-mean")
class NearestClassMean(Strategy):
    """Classify by the nearest mean of the training features of each class (Janson et al. 2022, arXiv 2210.04428).

    The head `"ncm"` (`ClassMeansHead`) as a strategy: it fills the rows of a linear head, so that the adapter is an
    ordinary linear probe. Use it on one: `get_peft_model(model, LinearProbeConfig())`; the result is saved and loaded
    like any adapter. `LinearProbeConfig(head="ncm")` does the same without a strategy, and can learn on, be joined and
    forget classes.

    Args:
        cosine: compare directions instead of distances.

    Raises:
        ValueError: `cosine` is neither True nor False.
    """

    name = "Nearest class mean"
    has_task_evidence = False

    def __init__(self, cosine: bool = False):
        self.cosine = check_flag("cosine", cosine)
        #: Of all images so far: a class may come again in another domain.
        self.means: ClassMeansHead | None = None

    def settings(self) -> dict[str, Any]:
        return {"cosine": self.cosine} if self.cosine else {}

    def title(self, adapter: str) -> str:
        return self.name

    def prepare(self, model: PeftModel) -> None:
        tuner, config = model.base_model, model.peft_config[model.active_adapter]
        if not tuner.pool.query_is_feature or config.head != "linear":
            raise ValueError(
                f"{self.name} compares features of the frozen model and fills a linear head, but this is "
                f"{type(tuner).__name__} with head={config.head!r}. Use it on a linear probe: LinearProbeConfig()."
            )
        if not config.tasks:  # one that has learnt tasks may learn on
            self.means = None

    @torch.no_grad()
    def learn(self, trainer: ContinualTrainer, task: Task) -> Any:
        tuner = trainer.tuner
        head: LinearHead = tuner.head.active
        means = self._means_for(head)
        # All examples on every process: each then has the same means, of every image once.
        for batch in trainer.plain_batches(task):
            means.observe(tuner.query(batch["pixel_values"]), batch["labels"])
        trainer.forget([task])
        means.fit()
        # Classes of a run before this one keep their rows.
        own = torch.tensor([name in trainer.scenario.classes for name in tuner.head.config.classes])
        own = own.to(head.weight.device)
        rows = means.sums.means
        rows = (F.normalize(rows, dim=-1) if self.cosine else rows).to(head.weight)
        head.weight[own] = rows[own]
        head.bias[own] = 0.0 if self.cosine else -rows[own].square().sum(-1) / 2
        head.bias[own & ~means.seen] = UNSEEN

    def _means_for(self, head: LinearHead) -> ClassMeansHead:
        """The means so far, with a row for each row of `head`."""
        if self.means is None:
            self.means = ClassMeansHead(head.sizes, 0)
        self.means.to(head.weight.device)
        self.means.grow(head.classes, keep=self.means.classes)
        return self.means

    def state_dict(self) -> dict[str, Any]:
        return {} if self.means is None else self.means.going_on()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means = None
        if state:
            classes, width = state["sums.totals"].shape
            self.means = ClassMeansHead(Sizes(width, width), classes)
            self.means.go_on(state)
            self.means.fit()
