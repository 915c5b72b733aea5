"""Naive fine-tuning: the whole backbone follows each task, and nothing holds the earlier ones."""

from __future__ import annotations

from peft import PeftModel

from ..trainer import ContinualTrainer, Strategy


class FineTuning(Strategy):
    """Train all weights, backbone and head, on each task in turn: the lower bound of continual learning.

    Use it on a linear probe with the plain cross-entropy over all classes seen:
    `get_peft_model(model, LinearProbeConfig(train_mask=False))`.
    """

    name = "Fine-tuning"

    def prepare(self, model: PeftModel) -> None:
        for parameter in model.base_model.encoder.base_layer.parameters():
            parameter.requires_grad_(True)

    def saved_bytes(self, trainer: ContinualTrainer, adapter_bytes: int) -> int:
        """The backbone has changed, so it must be kept with the head."""
        encoder = trainer.model.base_model.encoder.base_layer
        return adapter_bytes + sum(parameter.numel() * parameter.element_size() for parameter in encoder.parameters())
