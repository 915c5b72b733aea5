"""What the tests of joining and taking apart share: adapters of one tiny model that were learnt apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from tuner_cases import CASES, begin, config, images, prompted, task_names


#: A head without a learnt map of the query, which two adapters can have in common.
JOINABLE = [name for name in CASES if "textbook" not in name or name == "coda-textbook"]
JOINABLE.remove("dualprompt-key")
#: Those in which an image can take the prompts of one adapter.
CHOOSING = [
    name
    for name in JOINABLE
    if name not in ("coda-shared", "coda-textbook", "coda-layer-mean", "dualprompt-general", "linear-probe")
]
LDA = {"head": "lda", "head_options": {"shrinkage": 0.1}}
BY_CLASS = {"head": "lda", "head_options": {"shrinkage": 0.1, "by_class": True}}
FUSION = {"head": "fusion", "head_features": "cls", "train_prompts": "first_task"}
IMAGES_PER_CLASS = 8


def seen(task: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images of a task, and the number of each one's class in it: a class is a tint."""
    names = torch.arange(len(task_names(task))).repeat(IMAGES_PER_CLASS)
    tints = torch.randn(len(task_names(task)), 3, 1, 1, generator=torch.Generator().manual_seed(100 + task))
    return 0.5 * images(len(names), seed=200 + task) + 2 * tints[names], names


def learn(model: PeftModel, adapter: str, tasks: Sequence[int]) -> None:
    """Have an adapter learn these tasks: noise on all that is trained, the real images for heads that observe."""
    model.set_adapter(adapter)
    for task in tasks:
        begin(model, task)
        if model.base_model.head.active.observes:
            pixels, names = seen(task)
            rows = torch.tensor(model.peft_config[adapter].tasks[-1])[names]
            for pixel, row in zip(pixels, rows, strict=True):  # each alone: the order of sums is that of the images
                model.observe(pixel[None], row[None])
            model.fit_head()


def learnt_apart(case: str, halves: Sequence[Sequence[int]] = ((0, 1), (2, 3)), **settings: Any) -> PeftModel:
    """A model with the adapters "a", "b", ... of `case`, each of which has learnt the tasks of one of the halves."""
    model = prompted(case, tasks=0, **settings)
    for name, tasks in zip("abcdefg", halves, strict=False):
        torch.manual_seed(ord(name))
        model.add_adapter(name, config(case, **settings))
        learn(model, name, tasks)
    model.delete_adapter("default")
    return model.eval()


def answers(model: PeftModel, adapter: str, batch: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
    model.set_adapter(adapter)
    with torch.no_grad():
        return model.eval()(images() if batch is None else batch, **inputs).logits


def in_order(logits: torch.Tensor, classes: Sequence[str], order: Sequence[str]) -> torch.Tensor:
    """The columns of `classes`, brought into another order."""
    return logits[:, [list(classes).index(name) for name in order]]
