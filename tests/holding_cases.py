"""What the tests of methods that hold or distil share."""

from __future__ import annotations

import torch

from peft_cl import L2PConfig, LinearProbeConfig, Strategy
from peft_cl.strategies import FineTuning


def probe(**words) -> LinearProbeConfig:
    return LinearProbeConfig(**{"train_mask": False, **words})


def l2p(**words) -> L2PConfig:
    return L2PConfig(pool_size=6, prompt_length=2, top_k=2, **{"train_mask": False, **words})


#: A configuration, and what is trained with it.
ON = {"backbone": (probe, [FineTuning()]), "l2p": (l2p, [])}
#: A backbone made at random unlearns at once with the adapters' rate.
RATES = {"backbone": 1e-3, "l2p": 1e-2}


def trainer_on(make_trainer, on: str, *strategies: Strategy, config=None, **training):
    make_config, own = ON[on]
    settings = {"learning_rate": RATES[on], "num_train_epochs": 1, **training}
    return make_trainer(config or make_config(), strategy=[*own, *strategies], **settings)


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.tuner.lasting_parameters().items()}


def pixels_of(trainer, task, split: str = "test") -> torch.Tensor:
    return torch.cat([batch["pixel_values"] for batch in trainer.plain_batches(task, split)])


@torch.no_grad()
def logits_of(trainer, pixels: torch.Tensor) -> torch.Tensor:
    return trainer.model.eval()(pixel_values=pixels).logits
