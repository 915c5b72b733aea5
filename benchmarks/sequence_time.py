"""The wall time of a whole sequence as large as Split CIFAR-100: 10 tasks of 10 classes, 50,000 + 10,000 images.

    python benchmarks/sequence_time.py --batch-size 128 --workers 8          # ViT-B/16, on a GPU where there is one
    python benchmarks/sequence_time.py --backbone vit-tiny-64 --images 20    # a trial
    python benchmarks/sequence_time.py --pixels 32 --methods coda --epochs 20    # CODA-Prompt's published epochs

The images are random photographs, the weights of ViT-B/16 random too: time does not depend on them. Images are kept
decoded, for all methods by the first one, and queries kept, so later epochs and evaluations pay for neither. With
`--pixels` they are as small as CIFAR's, and are scaled to the backbone's size on the device.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import get_peft_model
from trainer_share import backbone_and_size, photographs
from transformers import ViTForImageClassification, ViTImageProcessorPil, set_seed

from peft_cl import (
    CodaPromptConfig,
    ContinualTrainer,
    ContinualTrainingArguments,
    DualPromptConfig,
    L2PConfig,
    class_incremental,
)


METHODS = {
    "best": CodaPromptConfig.from_preset("best"),
    "l2p": L2PConfig.from_preset("paper"),
    "dualprompt": DualPromptConfig.from_preset("paper"),
    "coda": CodaPromptConfig.from_preset("paper"),
}


def scale_on_device(model: ViTForImageClassification, size: int) -> None:
    """Scale the images to what the backbone reads before anything else."""

    def scaled(module: torch.nn.Module, args: tuple, words: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        images = words.pop("pixel_values", None)
        images, args = (args[0], args[1:]) if images is None else (images, args)
        images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        return (images, *args), words

    model.vit.embeddings.register_forward_pre_hook(scaled, with_kwargs=True)


def measure(name: str, data: tuple[Dataset, Dataset], images: str, options: argparse.Namespace) -> dict[str, Any]:
    """Learn and measure all tasks by one method; `images` is the folder of decoded images."""
    set_seed(0)
    model, size = backbone_and_size(options.backbone, getattr(torch, options.dtype))
    config, pixels = copy.deepcopy(METHODS[name]), options.pixels or size
    if pixels != size:
        scale_on_device(model, size)
        config.interpolate_pos_encoding = True  # or the trainer would refuse the images for their size
    train, test = data
    with tempfile.TemporaryDirectory() as folder:
        trainer = ContinualTrainer(
            get_peft_model(model, config),
            ContinualTrainingArguments(
                f"{folder}/run",
                num_train_epochs=options.epochs,
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=options.batch_size,
                dataloader_num_workers=options.workers,
                image_cache_dir=images,
                torch_compile=options.compile,
                logging_steps=100,
            ),
            class_incremental((train, test), options.tasks),
            processing_class=ViTImageProcessorPil(size={"height": pixels, "width": pixels}),
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    device = trainer.args.device
    return {
        "method": config.title,
        "pixels": pixels,
        "backbone": options.backbone,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "batch": options.batch_size,
        "epochs": options.epochs,
        "compiled": options.compile,
        "images": [len(train), len(test)],
        "seconds": seconds,
        "train_seconds": trainer.train_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--backbone", default="vit-b16", choices=["vit-tiny-64", "vit-b16"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--tasks", type=int, default=10, help="of 10 classes each")
    parser.add_argument("--images", type=int, default=500, help="training images of a class; a fifth of them for test")
    parser.add_argument("--pixels", type=int, help="of a side of the images; None: those of the backbone")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0, help="processes that fetch images")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    options = parser.parse_args()
    classes, size = 10 * options.tasks, backbone_and_size(options.backbone, torch.float32)[1]
    counts = options.images, max(1, options.images // 5)
    data = tuple(
        photographs(count * classes, options.pixels or size, classes, distinct=2000, seed=seed)
        for seed, count in enumerate(counts)
    )
    rows: list[dict[str, Any]] = []
    print("| Method | Device | Images | Epochs | Training | Whole sequence |")
    print("|---|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as images:
        for name in options.methods:
            row = measure(name, data, images, options)
            rows.append(row)
            print(
                f"| {row['method']} | {row['device']} | {row['images'][0]:,} + {row['images'][1]:,} | "
                f"{row['epochs']:g} | {row['train_seconds']:.0f} s | {row['seconds']:.0f} s |",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
