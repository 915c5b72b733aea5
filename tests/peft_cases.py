"""What the tests of LoRA and OSF share."""

from __future__ import annotations

import torch
from peft import PeftModel

from peft_cl import LinearProbeConfig
from peft_cl.strategies.lora import FirstSessionLoRA, SequentialLoRA
from peft_cl.strategies.osf import OSF


LDA = {"head": "lda", "head_options": {"shrinkage": 0.1}}
ALL = {
    "sequential": (SequentialLoRA, {}),
    "first": (FirstSessionLoRA, {}),
    "first+lda": (FirstSessionLoRA, LDA),
    "osf": (OSF, {}),
}
LORA = ["sequential", "first", "first+lda"]
PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()


def config_of(name: str) -> LinearProbeConfig:
    return LinearProbeConfig(train_mask=False, **ALL[name][1])


def made(make_trainer, name, *more, settings=None, **words):
    """A trainer of one of `ALL`, with further strategies where they are given."""
    strategy = [ALL[name][0](**(settings or {})), *more]
    return make_trainer(config_of(name), strategy=strategy, **{"max_steps": 3, **words})


def backbone_of(model: PeftModel) -> torch.nn.Module:
    return model.base_model.encoder.base_layer


@torch.no_grad()
def logits(model, pixels=PIXELS):
    return model.eval()(pixel_values=pixels).logits
