"""What prompts in 16 bits save, and what they cost: whole runs with each `storage_dtype`, on the embedded backbone.

    python benchmarks/storage.py --json benchmarks/results/storage/digits.json
    python benchmarks/storage.py --per-digit 4 --tasks 2 --epochs 1 --seeds 0      # a trial

The digits of scikit-learn come in tasks of as many digits each. Runs of a method and a seed differ in the number
format alone, in which prompts are rounded at the end of each task; accuracies are of what is saved. Differences are
from float32, the same seed, means over the seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import DatasetDict
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from peft_cl import (
    CodaPromptConfig,
    ContinualTrainer,
    ContinualTrainingArguments,
    DualPromptConfig,
    L2PConfig,
    class_incremental,
)
from peft_cl.assets import default_backbone
from peft_cl.commands.digits import load_digits_dataset


METHODS = {"l2p": L2PConfig, "dualprompt": DualPromptConfig, "coda": CodaPromptConfig}
FORMATS = ("float32", "bfloat16", "float16")


def learn(method: str, dtype: str, seed: int, data: DatasetDict, options: argparse.Namespace) -> dict[str, Any]:
    """Learn all tasks; what was saved, how large it is, and how good."""
    set_seed(seed)
    config = METHODS[method].from_preset("paper", storage_dtype=dtype)
    model = AutoModelForImageClassification.from_pretrained(default_backbone(), dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        trainer = ContinualTrainer(
            get_peft_model(model, config),
            ContinualTrainingArguments(
                folder,
                num_train_epochs=options.epochs,
                learning_rate=options.learning_rate,
                per_device_train_batch_size=16,
                seed=seed,
                use_cpu=True,
                disable_tqdm=True,
                pictures=False,
                logging_strategy="no",
            ),
            class_incremental(data, options.tasks, seed=seed),
            processing_class=AutoImageProcessor.from_pretrained(default_backbone()),
        )
        trainer.train()
        saved = load_file(Path(folder, "adapter_model.safetensors"))
        past = [each for name, each in trainer.tuner.pool.named_buffers() if name.startswith("past_")]
        return {
            "file_bytes": Path(folder, "adapter_model.safetensors").stat().st_size,
            "prompt_bytes": sum(each.nbytes for name, each in saved.items() if name.endswith("prompts")),
            "past_bytes_in_memory": sum(each.nbytes for each in past),
            "average_accuracy": trainer.metrics["average_accuracy"],
            "forgetting": trainer.metrics["forgetting"],
            "train_seconds": trainer.train_seconds,
        }


def rows_of(method: str, data: DatasetDict, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number format, means over the seeds."""
    rows, plain = [], []
    for dtype in FORMATS:
        runs = [learn(method, dtype, seed, data, options) for seed in options.seeds]
        plain = plain or runs
        differences = [
            run["average_accuracy"] - other["average_accuracy"] for run, other in zip(runs, plain, strict=True)
        ]
        rows.append(
            {
                "method": method,
                "storage_dtype": dtype,
                "seeds": options.seeds,
                "tasks": options.tasks,
                **{name: fmean(run[name] for run in runs) for name in runs[0]},
                "accuracy_difference": fmean(differences),
                "largest_difference": max(map(abs, differences)),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--per-digit", type=int, help="images of a digit, a quarter of them for test; None: all")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_digits_dataset(per_digit=options.per_digit)
    rows = [row for method in options.methods for row in rows_of(method, data, options)]
    print("| Method | Prompts in | File (kB) | Prompts (kB) | Past rows in memory (kB) | Accuracy (%) | Difference |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        sizes = [row[name] / 1000 for name in ("file_bytes", "prompt_bytes", "past_bytes_in_memory")]
        print(
            f"| {row['method']} | {row['storage_dtype']} | {sizes[0]:.1f} | {sizes[1]:.1f} | {sizes[2]:.1f} | "
            f"{100 * row['average_accuracy']:.2f} | {100 * row['accuracy_difference']:+.2f} |"
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
