"""A long sequence: what a step and the memory cost in the first tasks and in the last.

    python benchmarks/many_tasks.py --data DATA/tiny-imagenet-cl --tasks 100

Each task is an equal share of the classes. Printed for every method: the median time of a training step over the first
and over the last tenth of the tasks, their ratio, and the memory in use after the first tenth and at the end.

Test images fill whole evaluation batches, so that all batches are of one size: for each new size oneDNN
keeps compiled code where matrices are bfloat16, some MB of it, which would be counted as memory of the tasks.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback, set_seed

from peft_cl import (
    CodaPromptConfig,
    ContinualTrainer,
    ContinualTrainingArguments,
    DualPromptConfig,
    L2PConfig,
    class_incremental,
)
from peft_cl.assets import default_backbone


# One row or component a task, as the papers divide a pool of fixed size.
METHODS = {
    "l2p": lambda: L2PConfig(head_init="zeros"),
    "dualprompt": lambda: DualPromptConfig(head_init="zeros", pool_size=None),
    "coda": lambda: CodaPromptConfig(head_init="zeros", components_per_task=1),
}


def memory_in_use() -> float:
    """Memory of this process, in MB (Linux), without files mapped into it (the images) and what glibc keeps free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024 / 1e6


class Watch(TrainerCallback):
    """Seconds of each step, and memory after each task."""

    def __init__(self):
        self.steps: list[list[float]] = []
        self.memory: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.append([])

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps[-1].append(time.perf_counter() - self.began)

    def on_train_end(self, args, state, control, **kwargs):
        self.memory.append(memory_in_use())


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Run the sequence with one method."""
    set_seed(0)
    data = load_dataset(options.data)
    labels = np.array(data["test"]["label"])
    kept = [np.flatnonzero(labels == label)[: options.test_images] for label in np.unique(labels)]
    data["test"] = data["test"].select(np.concatenate(kept))
    backbone = default_backbone()
    model = AutoModelForImageClassification.from_pretrained(
        backbone, dtype=torch.bfloat16, attn_implementation="eager"
    )
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = ContinualTrainer(
            get_peft_model(model, METHODS[name]()),
            ContinualTrainingArguments(
                folder,
                num_train_epochs=1,
                per_device_train_batch_size=25,
                per_device_eval_batch_size=options.test_images,
                lr_scheduler_type="constant",
                learning_rate=1e-3,
                optim="adamw_torch",
                use_cpu=True,
                disable_tqdm=options.quiet,
            ),
            class_incremental(data, options.tasks, seed=0),
            processing_class=AutoImageProcessor.from_pretrained(backbone),
            callbacks=[watch],
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    tenth = max(1, options.tasks // 10)
    # The first step of a process pays for what is set up once.
    first = median(step for task in watch.steps[:tenth] for step in task[1:])
    last = median(step for task in watch.steps[-tenth:] for step in task[1:])
    return {
        "method": name,
        "tasks": trainer.finished_tasks,
        "first_step_ms": 1000 * first,
        "last_step_ms": 1000 * last,
        "ratio": last / first,
        "memory_early_mb": watch.memory[tenth - 1],
        "memory_end_mb": watch.memory[-1],
        "memory_mb": watch.memory,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder or Hub name of an image data set")
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--test-images", type=int, default=10, help="of each class")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(name, options) for name in options.methods]
    print("| Method | Tasks | Step, first tenth (ms) | Step, last tenth (ms) | Ratio | Memory (MB) | Whole run |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        steps = f"{row['first_step_ms']:.1f} | {row['last_step_ms']:.1f} | {row['ratio']:.3f}"
        memory = f"{row['memory_early_mb']:.0f} to {row['memory_end_mb']:.0f}"
        print(f"| {row['method']} | {row['tasks']} | {steps} | {memory} | {row['seconds']:.0f} s |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
