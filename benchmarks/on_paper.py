"""What several GPUs would give, computed from what one gave: a sequence of ImageNet's size, ViT-B/16 in bfloat16.

    python benchmarks/on_paper.py

Nothing is measured here but the rates of one H200 (`benchmarks/results/gpu/step_cost.json`). An image costs a pass or
two at these rates, divided by the GPUs. To it comes what processes send each other: gradients of pool and head after
each step of 128 images a GPU, and the sums of the head after each task, both by a ring (twice the bytes over the
slowest link). Assumed are 300 GB/s inside a machine, 3 GB/s (25 Gbit/s Ethernet) between machines, and 30 and 100
microseconds for each message. That images arrive in time is assumed too: the last column says how many a second they
are.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


RECORD = Path(__file__).parent / "results" / "gpu" / "step_cost.json"
TRAIN, TEST, TASKS, BATCH = 1_281_167, 50_000, 100, 128
#: Numbers of an image that a head of the preset "best" sees of ViT-B/16, and its cosines beside them.
SEEN, COSINES = 3072, 2000
#: Bytes of the sums over pairs of features, in float64: kernel LDA's, and LDA's of the prompted features.
KERNEL_SUMS, PROMPTED_SUMS = 8 * (SEEN + COSINES) ** 2, 8 * SEEN**2
LINKS = {1: (float("inf"), 0.0), 8: (300e9, 30e-6), 16: (3e9, 100e-6)}
LAYOUTS = {1: "1 GPU", 8: "1 machine with 8", 16: "2 machines with 8"}


@dataclass(frozen=True)
class Work:
    """A sequence: how many images go through which step, and what is sent.

    Attributes:
        training: images with kept queries that are trained on, those of all epochs together.
        single: images that go through one pass.
        double: images that go through both passes.
        gradients, sums: bytes sent after each step of the training, and after each task.
    """

    title: str
    method: str
    training: float
    single: float
    double: float
    gradients: int
    sums: int

    def seconds(self, gpus: int, rates: dict[str, float]) -> tuple[float, float]:
        """Seconds of the passes, and of what is sent."""
        passes = self.training / rates["training"] + self.single / rates["single"] + self.double / rates["double"]
        speed, latency = LINKS[gpus]
        steps = self.training / BATCH / gpus

        def sent(size: int) -> float:
            return 2 * (gpus - 1) / gpus * size / speed + latency

        return passes / gpus, steps * sent(self.gradients) + TASKS * sent(self.sums)


#: Test images of all tasks seen, after each of the tasks.
SEEN_TESTS = TEST * (TASKS + 1) / 2
FIRST = TRAIN / TASKS
WORKS = (
    Work("frozen features, best", "CODA-Prompt", 0, TRAIN + TEST, 0, 0, KERNEL_SUMS),
    Work(
        "DualPrompt, best: prompts of the first task, 5 epochs",
        "DualPrompt",
        5 * FIRST,
        SEEN_TESTS + TEST,
        TRAIN,
        4 * (10 * 4 + 5 * 2) * 768,
        KERNEL_SUMS + PROMPTED_SUMS,
    ),
    Work(
        "CODA-Prompt as published: 20 epochs of each task",
        "CODA-Prompt",
        20 * TRAIN,
        TRAIN + TEST + SEEN_TESTS,
        0,
        4 * (100 * (8 * 5 + 2 * 5) * 768 + 1000 * 769),
        0,
    ),
)


def rates_of(method: str, rows: list[dict]) -> dict[str, float]:
    """Images a second of one GPU: of a training step with kept queries, of one pass, of both."""
    found = {
        (row["phase"], row["cached"]): row["images_per_second"]
        for row in rows
        if row["method"] == method and row["dtype"] == "bfloat16"
    }
    names = {"training": ("train", True), "single": ("eval", True), "double": ("eval", False)}
    return {name: found[key] for name, key in names.items()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = json.loads(RECORD.read_text())
    print(
        f"{TRAIN:,} + {TEST:,} images in {TASKS} tasks, all classes seen measured after each. Computed, not measured."
    )
    print()
    print("| Sequence | GPUs | Passes (s) | Sent between processes (s) | Times one GPU's speed | Images a second |")
    print("|---|---|---:|---:|---:|---:|")
    for work in WORKS:
        rates = rates_of(work.method, rows)
        alone = work.seconds(1, rates)[0]
        for gpus, layout in LAYOUTS.items():
            passes, sent = work.seconds(gpus, rates)
            images = (work.training + work.single + work.double) / (passes + sent)
            times = alone / (passes + sent)
            print(f"| {work.title} | {layout} | {passes:,.0f} | {sent:,.1f} | {times:.1f} | {images:,.0f} |")
    print()
    print("A frozen backbone of 7 B parameters in bfloat16, divided over 8 GPUs by shard_backbone():")
    whole = 2 * 7e9
    gathered = whole * 7 / 8
    print(
        f"{whole / 8 / 1e9:.2f} GB of weights on each in place of {whole / 1e9:.0f}; a pass gathers "
        f"{gathered / 1e9:.1f} GB, {gathered / 300e9:.2f} s at 300 GB/s and {gathered / 25e9:.1f} s at 25 GB/s; "
        "a training step is three passes, two with kept queries"
    )


if __name__ == "__main__":
    main()
