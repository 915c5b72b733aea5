"""The slow learner: the backbone follows each task at a small rate, the head at the usual one."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from ..trainer import ContinualTrainingArguments, register_strategy
from .fine_tuning import FineTuning
from .settings import check_number


@register_strategy("slow-learner")
class SlowLearner(FineTuning):
    """SLCA: slow learner with classifier alignment (Zhang et al., ICCV 2023, arXiv 2303.05118, section 3.2).

    All weights are trained on each task in turn, those of the backbone at `rate_ratio` times the rate of the head. A
    pre-trained backbone then changes little, and what little it changes serves the task. The alignment of the
    classifier after each task is the head `"aligned"`: with it the method is SLCA, and elsewhere "Slow fine-tuning".

    Any head can be used. One that is computed from sums (`"ncm"`, `"lda"`, `"ridge"`, the Gaussians of `"aligned"`)
    takes a class's features when its task is learnt, and the backbone moves on after that. The slower, the better
    they still fit; `drift_compensation` in the adapter's configuration lets them follow. Under such a head a linear
    one is trained, which is left out of the saved adapter.

    Args:
        rate_ratio: rate of the backbone over `learning_rate` of the arguments, above 0 to 1. A rate of its own,
            `learning_rates={"backbone": ...}` in the arguments, comes before it.

    Raises:
        ValueError: a ratio out of range; what `FineTuning` refuses.

    Example:
        >>> model = get_peft_model(model, LinearProbeConfig(head="aligned"))        # doctest: +SKIP
        >>> trainer = ContinualTrainer(..., strategy=SlowLearner())                 # doctest: +SKIP
    """

    name = "Slow fine-tuning"
    why_trained_head = ""
    limits = (
        *FineTuning.limits,
        "The backbone has moved a little with each task: what the head knows of earlier classes is of features as "
        "they were when their task was learnt.",
    )

    def __init__(self, rate_ratio: float = 0.01):
        self.rate_ratio = check_number("rate_ratio", rate_ratio, 0.01, above=0, most=1)

    def settings(self) -> dict[str, Any]:
        return {"rate_ratio": self.rate_ratio}

    def prepare(self, model: PeftModel) -> None:
        super().prepare(model)
        is_aligned = model.peft_config[model.active_adapter].head == "aligned"
        self.name = "SLCA" if is_aligned else SlowLearner.name

    def learning_rates(self, args: ContinualTrainingArguments) -> dict[str, float]:
        return {"backbone": args.learning_rate * self.rate_ratio}
