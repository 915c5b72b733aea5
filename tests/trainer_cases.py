"""What the trainer's tests share: small adapters, and images that can be learnt at a glance."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig, LinearProbeConfig


CONFIGS = {
    "l2p": lambda: L2PConfig(pool_size=6, prompt_length=2, top_k=2),
    "dualprompt": lambda: DualPromptConfig(prompt_length=2, g_prompt_length=2),
    "coda": lambda: CodaPromptConfig(components_per_task=2, prompt_length=4),
    "linear-probe": lambda: LinearProbeConfig(),
}


def images(per_class: int, seed: int) -> Dataset:
    """Six classes of 32x32 images, each a colour with noise: learnable at a glance."""
    rng = np.random.default_rng(seed)
    colours = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220], [220, 220, 30], [30, 220, 220], [220, 30, 220]])
    labels = np.repeat(np.arange(6), per_class)
    pixels = colours[labels][:, None, None] + rng.normal(0, 25, (len(labels), 32, 32, 3))
    pictures = [PILImage.fromarray(picture.clip(0, 255).astype("uint8")) for picture in pixels]
    names = ["red", "green", "blue", "yellow", "cyan", "magenta"]
    return Dataset.from_dict(
        {"image": pictures, "label": labels.tolist()},
        features=Features({"image": Image(), "label": ClassLabel(names=names)}),
    )


def whole_and_resumed(make):
    """A run, and one that was interrupted after its first task and went on; `make(**words)` makes a trainer of it."""
    whole = make(folder="whole")
    whole.train()
    part = make()
    part.train_task(part.scenario[0])
    again = make()
    again.train(resume_from_checkpoint=True)
    return whole, again
