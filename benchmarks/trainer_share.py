"""The trainer's own share of a training step: everything but the model's forward and backward.

    python benchmarks/trainer_share.py                        # the embedded backbone, 64 pixels
    python benchmarks/trainer_share.py --backbone vit-b16     # ViT-B/16 with random weights, 224 pixels
    python benchmarks/trainer_share.py --backbone vit-b16 --device cuda --batch-size 128 --workers 8

Random photographs, as JPEG, are learnt by CODA-Prompt: fetched, decoded, scaled, batched, and the optimizer stepped;
then once more with `image_cache_dir`, from which they come decoded and scaled. Queries are cached, which makes the
model's part the smallest. On a GPU the model's part is what the GPU takes for it (events around forward and
backward): where the rest is done meanwhile, its share is nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from peft import get_peft_model
from PIL import Image as PILImage
from steps import finish_work
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification, ViTImageProcessorPil, set_seed

from peft_cl import CodaPromptConfig, ContinualTrainer, ContinualTrainingArguments, class_incremental
from peft_cl.assets import default_backbone


def photographs(count: int, size: int, classes: int = 2, distinct: int | None = None, seed: int = 0) -> Dataset:
    """Smooth random images of `size` pixels drawn from `seed`, as JPEG files in memory, equally many of each class.

    Of thousands of images only some need be `distinct`: the others are the same files again, which take as long.
    """
    rng = np.random.default_rng(seed)
    files = []
    for _ in range(min(count, distinct or count)):
        coarse = PILImage.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((size, size), PILImage.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append({"bytes": buffer.getvalue(), "path": None})
    files = [files[index % len(files)] for index in range(count)]
    labels = [index % classes for index in range(count)]
    return Dataset.from_dict(
        {"image": files, "label": labels},
        features=Features({"image": Image(), "label": ClassLabel(num_classes=classes)}),
    )


class Watch(TrainerCallback):
    """Seconds of an epoch, and those spent in the model's forward and backward; the last epoch's stay."""

    def __init__(self, device: str):
        self.on_gpu = device != "cpu"
        self.calls: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        """A moment: of the clock, or of the GPU's queue."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1000 if self.on_gpu else ended - began

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.calls.append((began, self.now()))

        return call

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        finish_work()
        self.calls.clear()
        self.began = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        finish_work()
        self.epoch = time.perf_counter() - self.began
        self.epoch_model = sum(self.between(*call) for call in self.calls)


def backbone_and_size(name: str, dtype: torch.dtype) -> tuple[ViTForImageClassification, int]:
    if name == "vit-b16":
        return ViTForImageClassification(ViTConfig()).to(dtype), 224
    return ViTForImageClassification.from_pretrained(default_backbone(), dtype=dtype), 64


def measure(options: argparse.Namespace, image_cache: bool) -> dict[str, Any]:
    """Train for two epochs, and divide the time of the second."""
    set_seed(0)
    model, size = backbone_and_size(options.backbone, getattr(torch, options.dtype))
    data = photographs(options.batch_size * options.steps, size)
    scenario = class_incremental((data, photographs(options.batch_size, size, seed=1)), 1)
    watch = Watch(options.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ContinualTrainer(
            get_peft_model(model, CodaPromptConfig(components_per_task=10)),
            ContinualTrainingArguments(
                folder,
                num_train_epochs=2,
                per_device_train_batch_size=options.batch_size,
                use_cpu=options.device == "cpu",
                dataloader_num_workers=options.workers,
                dataloader_persistent_workers=options.workers > 0,
                disable_tqdm=True,
                image_cache_dir=f"{folder}/images" if image_cache else None,
            ),
            scenario,
            processing_class=ViTImageProcessorPil(size={"height": size, "width": size}),
            callbacks=[watch],
        )
        trainer.model.forward = watch.timed(trainer.model.forward)
        trainer.accelerator.backward = watch.timed(trainer.accelerator.backward)
        trainer.train()
    return {
        "backbone": options.backbone,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "batch": options.batch_size,
        "image_cache": image_cache,
        "step_ms": 1000 * watch.epoch / options.steps,
        "model_ms": 1000 * watch.epoch_model / options.steps,
        "share": 1 - watch.epoch_model / watch.epoch,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit-tiny-64", choices=["vit-tiny-64", "vit-b16"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="in an epoch")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--workers", type=int, default=0, help="processes that fetch images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(options, image_cache) for image_cache in (False, True)]
    print("| Backbone | Dtype | Batch | Images | Step (ms) | Model (ms) | Trainer's share |")
    print("|---|---|---:|---|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['backbone']} | {row['dtype']} | {row['batch']} | {'kept' if row['image_cache'] else 'decoded'} | "
            f"{row['step_ms']:.1f} | {row['model_ms']:.1f} | {row['share']:.1%} |"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
