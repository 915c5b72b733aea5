"""A process that trains a small sequence, and may kill itself: `sequence_process.py FOLDER METHOD KILL_AT RESUME`.

It counts what happens (batches, steps, files written), and sends itself SIGKILL at event number KILL_AT (0: never).
It prints the number of events, and then of processes.
"""

from __future__ import annotations

import os
import signal
import sys

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from peft import get_peft_model
from PIL import Image as PILImage
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from peft_cl import (
    CodaPromptConfig,
    ContinualTrainer,
    ContinualTrainingArguments,
    DualPromptConfig,
    L2PConfig,
    RandomResizedCropFlip,
    class_incremental,
)


CONFIGS = {
    "l2p": lambda: L2PConfig(pool_size=6, prompt_length=2, top_k=2, frequency_penalty=True, task_evidence=2.0),
    "dualprompt": lambda: DualPromptConfig(prompt_length=2, g_prompt_length=2, layers=[1], g_layers=[0]),
    "coda": lambda: CodaPromptConfig(components_per_task=2, prompt_length=4, layers=[0, 1]),
}
events, kill_at = 0, 0


def happened() -> None:
    global events
    events += 1
    if events == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


def counted(function):
    """The function, with an event before and after each call."""

    def call(*args, **kwargs):
        happened()
        result = function(*args, **kwargs)
        happened()
        return result

    return call


def examples(per_class: int, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), per_class)
    pixels = rng.normal(128, 30, (len(labels), 16, 16, 3)) + 20 * labels[:, None, None, None]
    return Dataset.from_dict(
        {"image": [PILImage.fromarray(each.clip(0, 255).astype("uint8")) for each in pixels], "label": labels},
        features=Features({"image": Image(), "label": ClassLabel(num_classes=6)}),
    )


def trainer_processes() -> int:
    """`torchrun` says how many there are; the total batch stays the same."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def main(folder: str, method: str, kill: str, resume: str) -> None:
    global kill_at
    kill_at = int(kill)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dropout = 0.0 if os.environ.get("PLAIN") else 0.1
    size = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "num_labels": 3}
    width = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "hidden_dropout_prob": dropout}
    base = ViTForImageClassification(ViTConfig(**size, **width))
    ContinualTrainer.training_step = counted(ContinualTrainer.training_step)
    ContinualTrainer.prediction_step = counted(ContinualTrainer.prediction_step)
    os.replace, os.fsync = counted(os.replace), counted(os.fsync)
    trainer = ContinualTrainer(
        get_peft_model(base, CONFIGS[method]()),
        ContinualTrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=4 // trainer_processes(),
            per_device_eval_batch_size=6,
            learning_rate=0.01,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        ),
        class_incremental((examples(6, 0), examples(3, 1)), 3, seed=1),
        processing_class=ViTImageProcessorPil(size={"height": 16, "width": 16}),
        augmentation=None if os.environ.get("PLAIN") else RandomResizedCropFlip(size=16),
    )
    trainer.train(resume_from_checkpoint=resume == "resume")
    print(events)
    print("processes", trainer.accelerator.num_processes)


if __name__ == "__main__":
    main(*sys.argv[1:])
