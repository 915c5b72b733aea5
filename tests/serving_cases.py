"""Sessions on a tiny model whose classes are colours, for several test files."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from transformers import ViTImageProcessorPil
from tuner_cases import prompted

from peft_cl.scenarios import ImageTransform
from peft_cl.serving import Session


HEADS = {
    "ncm": {"head": "ncm"},
    "lda": {"head": "lda"},
    "lda by class": {"head": "lda", "head_options": {"by_class": True}},
    "kernel lda": {"head": "lda", "head_options": {"fourier": 30}},
    "ridge": {"head": "ridge"},
    "ridge of a projection": {"head": "ridge", "head_options": {"projection": 300}},
    "aligned": {"head": "aligned", "head_options": {"samples": 64, "epochs": 100, "learning_rate": 0.1}},
    "fusion": {"head": "fusion", "head_options": {"prompted": "aligned", "query": "lda"}},
}
METHODS = ("l2p", "l2p-textbook", "dualprompt", "coda", "coda-layer-mean", "linear-probe")
#: The colour of each class, far enough from the others for a random backbone.
COLOURS = dict(zip("abcdefgh", np.random.default_rng(3).integers(0, 256, (8, 3)), strict=True))


def pictures(colour: str, count: int = 5, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng([seed, ord(colour)])
    noisy = np.array(COLOURS[colour]) + rng.normal(0, 12, (count, 16, 16, 3))
    return [Image.fromarray(each.clip(0, 255).astype(np.uint8)) for each in noisy]


def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 16, "width": 16})


def session(method: str = "linear-probe", head: str = "lda", **more) -> Session:
    """An adapter that has learnt the classes a to d in two tasks, as a session."""
    torch.manual_seed(0)  # rows of the aligned head begin at random
    model, transform = prompted(method, tasks=0, **HEADS[head], **more), ImageTransform(processor())
    for names in ("ab", "cd"):
        model.begin_task([*names])
        rows = model.config.label2id
        model.fit_head({"pixel_values": transform(pictures(name, 12)), "labels": [rows[name]] * 12} for name in names)
    return Session(model, processor(), name="letters", task_names=("first", "second"))
