"""What the tests of methods that isolate parameters share: a small whole backbone, and runs that are cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from peft_cl import LinearProbeConfig, Strategy, task_incremental
from peft_cl.strategies import FineTuning


GOLDEN = Path(__file__).parent / "golden" / "strategies"
#: Of the backbone. Each of three tasks takes 8 steps: two epochs of 32 images.
SIZES = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture(name="make")
def make_whole(make_trainer, tiny_vit, data):
    """`make(strategy, ...)`: a trainer of a whole backbone of two layers on three tasks that are known at test."""

    def of(*strategies, num_tasks=3, config=None, **more):
        scenario = more.pop("scenario", None) or task_incremental(data, num_tasks)
        # AdamW with weight decay: it moves weights that have no gradient.
        training = {"learning_rate": 1e-3, "weight_decay": 0.1, **more}
        config = config or LinearProbeConfig()
        training.setdefault("model", get_peft_model(tiny_vit(**SIZES), config))
        return make_trainer(config, scenario=scenario, strategy=[FineTuning(), *strategies], **training)

    return of


def pixels(seed: int = 0, count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def all_weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.tuner.lasting_parameters().items()}


class Watch(Strategy):
    """`look(trainer, task)` at the end of each task, after the strategies before it."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def end_task(self, trainer, task):
        self.seen.append(self.look(trainer, task))


class Interrupt(TrainerCallback):
    """Stop the process, as far as the run knows, when a checkpoint of a task's step is written."""

    def __init__(self, task: int, step: int):
        self.task, self.step = task, step
        self.trainer = None

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.task.index == self.task and state.global_step == self.step:
            raise KeyboardInterrupt


def check_resumes(make, kind, task: int, step: int) -> None:
    """A run that was interrupted in the middle of a task ends as one that was not, to the bit."""
    settings = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1, "max_steps": 8}
    whole = make(kind(), folder="whole", **settings)
    whole.train()
    interrupt = Interrupt(task, step)
    part = interrupt.trainer = make(kind(), callbacks=[interrupt], **settings)
    with pytest.raises(KeyboardInterrupt):
        part.train()
    again = make(kind(), **settings)
    again.train(resume_from_checkpoint=True)
    check_same_run(again, whole)


def check_same_run(found, expected) -> None:
    own, others = all_weights(found), all_weights(expected)
    assert all(torch.equal(own[name], value) for name, value in others.items())
    states = [trainer.strategy.state_dict()["1"] for trainer in (found, expected)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    np.testing.assert_array_equal(found.accuracy_matrix, expected.accuracy_matrix)
