"""A head of your own: one class, chosen by its name in any configuration.

    python examples/custom_head.py

It is Gaussian naive Bayes with one variance for each feature: nearest class mean in which noisy features weigh less.
What it needs are sums over the training features, so the order of the tasks does not matter and nothing is forgotten.
A head that is trained by gradient descent has parameters and no `observe`: see `peft_cl/heads/linear.py`.
"""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from peft_cl import (
    ContinualTrainer,
    ContinualTrainingArguments,
    LinearProbeConfig,
    SolvedHead,
    Sums,
    class_incremental,
    register_head,
)
from peft_cl.assets import default_backbone
from peft_cl.commands.digits import draw_digits_dataset


@register_head("naive-bayes")
class NaiveBayesHead(SolvedHead):
    """logit_c = -1/2 sum_d (f_d - mu_cd)^2 / var_d, up to what all classes share. `SolvedHead` keeps the sums, joins
    them over processes and adapters, saves them, and multiplies the rows with the features.

    Args:
        floor: least variance of a feature, in parts of the mean one.
    """

    title = "naive Bayes"

    def __init__(self, sizes, classes, *, floor: float = 0.01):
        if not 0 < floor <= 1:
            raise ValueError(f"floor is {floor}, but must be a number above 0 and at most 1.")
        super().__init__(sizes, classes)
        self.floor = floor

    def solve(self, sums: Sums) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows (classes, features), biases (classes,), and what is subtracted from features, (features,)."""
        variance = sums.within().diagonal() / max(sums.images, 1)
        variance = variance.clamp_min(self.floor * variance.mean()).clamp_min(1e-12)
        offsets = sums.means - sums.mean
        return offsets / variance, -(offsets.square() / variance).sum(-1) / 2, sums.mean


if __name__ == "__main__":
    set_seed(0)
    backbone = default_backbone()  # or "google/vit-base-patch16-224-in21k"
    config = LinearProbeConfig(head="naive-bayes", head_options={"floor": 0.05}, head_features="cls+mean")
    trainer = ContinualTrainer(
        get_peft_model(AutoModelForImageClassification.from_pretrained(backbone, dtype="float32"), config),
        ContinualTrainingArguments("out/custom_head"),
        class_incremental(draw_digits_dataset(), num_tasks=5),
        processing_class=AutoImageProcessor.from_pretrained(backbone),
    )
    trainer.train()
    print(f"{trainer.results.method}: {trainer.metrics['average_accuracy']:.1%} of the digits")
