"""What the tests of methods with a memory of images share: small trainers of each."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from trainer_cases import CONFIGS
from transformers import TrainerCallback

from peft_cl import Strategy
from peft_cl.strategies import ExperienceReplay, FineTuning
from peft_cl.strategies.dark_experience_replay import DarkExperienceReplay
from peft_cl.strategies.gem import AGEM, GEM
from peft_cl.strategies.icarl import ICaRL


EXEMPLARS = {"head": "ncm", "head_options": {"metric": "cosine", "normalize": True}, "head_features": "cls"}
STRATEGIES = {
    "ER": lambda: ExperienceReplay(10, memory="balanced"),
    "GEM": lambda: GEM(10),
    "A-GEM": lambda: AGEM(10),
    "DER++": lambda: DarkExperienceReplay(10),
    "iCaRL": lambda: ICaRL(12),
}


@pytest.fixture(name="make_trainer")
def make_small(make_trainer, tiny_vit):
    """The trainer of `conftest`, on two layers."""

    def make(config, **words):
        torch.manual_seed(0)
        if "model" not in words:
            words["model"] = get_peft_model(tiny_vit(num_hidden_layers=2), config)
        return make_trainer(config, **words)

    return make


def config_for(strategy: Strategy, on: str = "linear-probe", **settings):
    config = CONFIGS[on]()
    exemplars = EXEMPLARS if isinstance(strategy, ICaRL) else {}
    for name, value in {"train_mask": False, **exemplars, **settings}.items():
        setattr(config, name, value)
    return config


def on_backbone(make_trainer, *strategies: Strategy, train_mask: bool = False, **training):
    config = config_for(strategies[0], train_mask=train_mask)
    training = {"learning_rate": 1e-3, "num_train_epochs": 1, **training}
    return make_trainer(config, strategy=[FineTuning(), *strategies], **training)


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.tuner.model.state_dict().items()}


class Interrupt(TrainerCallback):
    """After the checkpoint of a step, in the last task."""

    def __init__(self, step: int):
        self.step, self.trainer = step, None

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.task.index == 1 and state.global_step == self.step:
            raise KeyboardInterrupt
