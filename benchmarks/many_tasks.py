"""A long sequence: what a step and the memory cost in the first tasks and in the last.

    python benchmarks/many_tasks.py --data DATA/tiny-imagenet-cl --tasks 100

Each task is an equal share of the classes. Printed for every method, over the first and over the last tenth of the
tasks: the median time of a training step, and the median of a step over the frozen model's bare forward, timed after
every step; the ratio of these two; and the memory in use after the first tenth and at the end. The bare
forward costs the same all the time: what changes its time is the machine, which changes the step's as well.

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
from collections.abc import Callable
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


BATCH_SIZE = 25


def memory_in_use() -> float:
    """Memory of this process, in MB (Linux), without files mapped into it (the images) and what glibc keeps free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024 / 1e6


class Watch(TrainerCallback):
    """For each task, seconds of its steps and of a bare pass after each of them; and memory after each task."""

    def __init__(self, bare: Callable[[], object]):
        self.bare = bare
        self.steps: list[list[float]] = []
        self.passes: list[list[float]] = []
        self.memory: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.append([])
        self.passes.append([])

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        end = time.perf_counter()
        self.steps[-1].append(end - self.began)
        self.bare()
        self.passes[-1].append(time.perf_counter() - end)

    def on_train_end(self, args, state, control, **kwargs):
        self.memory.append(memory_in_use())

    def medians(self, tasks: slice) -> tuple[float, float]:
        """Of some tasks: seconds of a step, and a step over the bare pass behind it."""
        # The first step of a task pays for what is set up once.
        steps = [step for task in self.steps[tasks] for step in task[1:]]
        passes = [seconds for task in self.passes[tasks] for seconds in task[1:]]
        return median(steps), median(step / bare for step, bare in zip(steps, passes, strict=True))


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Run the sequence with one method."""
    set_seed(0)
    data = load_dataset(options.data)
    labels = np.array(data["test"]["label"])
    kept = [np.flatnonzero(labels == label)[: options.test_images] for label in np.unique(labels)]
    data["test"] = data["test"].select(np.concatenate(kept))
    backbone = default_backbone()
    how = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    model, frozen = (AutoModelForImageClassification.from_pretrained(backbone, **how) for _ in range(2))
    pixels = torch.zeros(BATCH_SIZE, 3, frozen.config.image_size, frozen.config.image_size, dtype=torch.bfloat16)
    watch = Watch(torch.no_grad()(lambda: frozen.eval()(pixels)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = ContinualTrainer(
            get_peft_model(model, METHODS[name]()),
            ContinualTrainingArguments(
                folder,
                num_train_epochs=1,
                per_device_train_batch_size=BATCH_SIZE,
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
    first, last = watch.medians(slice(tenth)), watch.medians(slice(-tenth, None))
    return {
        "method": name,
        "tasks": trainer.finished_tasks,
        "first_step_ms": 1000 * first[0],
        "last_step_ms": 1000 * last[0],
        "first_over_bare": first[1],
        "last_over_bare": last[1],
        "ratio": last[1] / first[1],
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
    print("| Method | Tasks | Step, first and last tenth (ms) | Over a bare pass | Ratio | Memory (MB) | Whole run |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        steps = f"{row['first_step_ms']:.1f}, {row['last_step_ms']:.1f}"
        over = f"{row['first_over_bare']:.3f}, {row['last_over_bare']:.3f} | {row['ratio']:.3f}"
        memory = f"{row['memory_early_mb']:.0f}, {row['memory_end_mb']:.0f}"
        print(f"| {row['method']} | {row['tasks']} | {steps} | {over} | {memory} | {row['seconds']:.0f} s |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
