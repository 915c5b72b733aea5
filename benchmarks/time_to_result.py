"""How long a whole sequence takes with the presets "best", beside the steps of the public code's shape alone.

    python benchmarks/time_to_result.py --data DATA/tiny-imagenet-cl --json benchmarks/results/cpu/time_to_result.json

Ours is the wall time of everything: images decoded, prompts learnt, heads computed, all classes seen measured after
each task, adapter saved. The reference is its training steps and nothing else, as many as 5 epochs have: two whole
passes of the same backbone and gradients to all weights (`reference_steps`, the shape of the public CODA-Prompt code).
The median is taken of steps before and after each sequence, in the same process: both see the machine as it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import load_dataset
from head_features import METHODS, add_options, learn_prompts
from steps import reference_steps
from transformers import AutoModelForImageClassification

from peft_cl import ContinualTrainer
from peft_cl.assets import default_backbone


BATCH_SIZE, EPOCHS = 25, 5


def reference(steps: int, classes: int) -> list[float]:
    """Seconds of some training steps, without the first two, which warm up."""
    backbone = AutoModelForImageClassification.from_pretrained(
        default_backbone(), dtype="float32", num_labels=classes, ignore_mismatched_sizes=True
    )
    size = backbone.config.image_size
    train, _ = reference_steps(backbone, torch.randn(BATCH_SIZE, 3, size, size), torch.randint(classes, (BATCH_SIZE,)))
    return [train.seconds() for _ in range(steps + 2)][2:]


def measure(name: str, seed: int, data: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Learn and measure all tasks by one method."""
    trainer = learn_prompts(name, seed, data, options, ContinualTrainer, settings={})
    steps = EPOCHS * sum(-(-len(task.train) // BATCH_SIZE) for task in trainer.scenario)
    seconds = reference(options.steps, len(trainer.scenario.classes))
    began = time.perf_counter()
    trainer.train()
    own = time.perf_counter() - began
    seconds += reference(options.steps, len(trainer.scenario.classes))
    return {
        "method": name,
        "title": METHODS[name].title,
        "seed": seed,
        "accuracy": trainer.metrics["average_accuracy"],
        "seconds": own,
        "training_seconds": trainer.train_seconds,
        "reference_step_ms": 1e3 * median(seconds),
        "reference_steps": steps,
        "reference_seconds": steps * median(seconds),
        "ratio": own / (steps * median(seconds)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, output=False)
    parser.add_argument("--methods", nargs="+", default=["none", "coda"], choices=METHODS)
    parser.add_argument("--steps", type=int, default=40, help="of the reference, before and after each sequence")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    options = parser.parse_args()
    options.attention, options.epochs = "sdpa", None
    torch.set_num_threads(options.threads)
    data, rows = load_dataset(options.data), []
    print("| Prompts | Seed | Accuracy (%) | Whole sequence (s) | Reference's steps alone (s) | Ratio |")
    print("|---|---:|---:|---:|---:|---:|")
    for seed in options.seeds:
        for name in options.methods:
            with tempfile.TemporaryDirectory() as folder:
                options.work = Path(folder)
                row = measure(name, seed, data, options)
            rows.append(row)
            print(
                f"| {row['title']} | {seed} | {100 * row['accuracy']:.2f} | {row['seconds']:.0f} | "
                f"{row['reference_seconds']:.0f} ({row['reference_steps']:,} of {row['reference_step_ms']:.0f} ms) | "
                f"{row['ratio']:.3f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
