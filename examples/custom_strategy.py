"""A comparison method of your own: one class, chosen by its name in configurations and suites.

    python examples/custom_strategy.py

It pulls the weights to those that the task before left (L2-SP of Li et al. 2018, arXiv 1802.01483, eq. 3, from task to
task). With `--import examples/custom_strategy.py`, `peft-cl train` and `peft-cl compare` know `strategy: pull-back`.
"""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from peft_cl import (
    ContinualTrainer,
    ContinualTrainingArguments,
    LinearProbeConfig,
    Strategy,
    class_incremental,
    register_strategy,
)
from peft_cl.assets import default_backbone
from peft_cl.commands.digits import draw_digits_dataset
from peft_cl.strategies import FineTuning


@register_strategy("pull-back")
class PullBack(Strategy):
    """Adds strength / 2 * |w - w_before|^2 to the loss, over the weights that last from task to task."""

    name = "Pull back"

    def __init__(self, strength: float = 0.1):
        if not strength >= 0:
            raise ValueError(f"strength is {strength}, but must be a number of at least 0. Give one such as 0.1.")
        self.strength = strength
        self.before: dict[str, torch.Tensor] = {}

    def settings(self):
        return {"strength": self.strength}

    def prepare(self, model):
        self.before = {}

    def begin_task(self, trainer, task):
        """After an interruption it is called with the weights of the task's beginning too: no state need be kept."""
        if task.index:
            self.before = {name: value.detach().clone() for name, value in trainer.tuner.lasting_parameters().items()}

    def losses(self, trainer, inputs, logits):
        now = trainer.tuner.lasting_parameters()
        pulled = [(now[name] - value).square().sum() for name, value in self.before.items()]
        return {"pull_back": self.strength / 2 * sum(pulled)} if pulled else {}


if __name__ == "__main__":
    backbone = default_backbone()  # or "google/vit-base-patch16-224-in21k"
    for strategies in ([FineTuning()], [FineTuning(), PullBack()]):
        set_seed(0)
        base = AutoModelForImageClassification.from_pretrained(backbone, dtype="float32")
        trainer = ContinualTrainer(
            get_peft_model(base, LinearProbeConfig(train_mask=False)),
            ContinualTrainingArguments(
                f"out/custom_strategy/{len(strategies)}", num_train_epochs=1, learning_rate=3e-4
            ),
            class_incremental(draw_digits_dataset(), num_tasks=5),
            processing_class=AutoImageProcessor.from_pretrained(backbone),
            strategy=strategies,
        )
        trainer.train()
        print(f"{trainer.results.method}: {trainer.metrics['average_accuracy']:.1%} of the digits")
