"""What the tests of heads that observe share: configurations, and logits to compare with."""

from __future__ import annotations

import torch
from datasets import Dataset

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig
from peft_cl.heads import LDAHead, Sizes


WIDE = {"head_features": "cls+mean", "head_layers": 3}
LDA = {"head": "lda", "head_options": {"shrinkage": 0.1}}
PROMPTS = {
    "l2p": lambda **more: L2PConfig(pool_size=6, prompt_length=2, top_k=2, **more),
    "dualprompt": lambda **more: DualPromptConfig(prompt_length=2, g_prompt_length=2, **more),
    "coda": lambda **more: CodaPromptConfig(components_per_task=2, prompt_length=4, **more),
}


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-4 of the largest: passes in batches of other sizes round in other ways."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def adapter_logits(trainer, data: Dataset) -> torch.Tensor:
    batch = trainer._collators[False](list(data))
    with torch.no_grad():
        return trainer.model.eval()(pixel_values=batch["pixel_values"]).logits


def batch_of(trainer, data: Dataset) -> dict[str, torch.Tensor]:
    return trainer._collators[False](list(data))


def all_at_once(trainer, data) -> torch.Tensor:
    """Logits for the test images of an LDA on the frozen features of all training images, computed here."""
    train, test = (batch_of(trainer, data[split]) for split in ("train", "test"))
    tuner = trainer.tuner
    features = tuner.query(train["pixel_values"])
    order = [trainer.scenario.classes.index(name) for name in tuner.head.config.classes]
    head = LDAHead(Sizes(features.shape[1], 0), len(order), shrinkage=0.1)
    head.observe(features, train["labels"])
    head.fit()
    return head(tuner.query(test["pixel_values"]))
