"""A data set of ImageNet's size in 100 tasks: is the memory flat, are the statistics exact?

    python benchmarks/scale.py --json benchmarks/results/cpu/scale.json
    python benchmarks/scale.py --classes 20 --images 2000 --tasks 10     # small, to try it

1,000 classes and 1.3 million synthetic JPEG images, which stay on the disk and are read from there as they are used.
LDA on the frozen features of a small ViT of random weights learns them in 100 tasks; all classes seen are measured
after each. Only the backbone is small: images, labels, tasks, test images and the sums are as many as ImageNet's.

Printed: memory in use after the first tenth of the tasks and at the end, and at most between two tasks; and how far
class means, the covariance within classes and the logits lie from those of all data at once. These are computed from
the features by the textbook's two passes (means first, then squares around them), not by sums.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from many_tasks import memory_in_use
from peft import get_peft_model
from PIL import Image as PillowImage
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, set_seed

from peft_cl import ContinualTrainer, ContinualTrainingArguments, LinearProbeConfig, class_incremental


SIZE, WIDTH, SHRINKAGE = 16, 64, 0.01


def images(count: int, classes: int, seed: int) -> Iterator[dict[str, Any]]:
    """JPEG images, class after class again and again: a pattern of the class's own under noise."""
    patterns = np.random.default_rng(0).integers(0, 256, (classes, 4, 4, 3))
    draw = np.random.default_rng(seed)
    for index in range(count):
        label = index % classes
        pattern = patterns[label].repeat(SIZE // 4, 0).repeat(SIZE // 4, 1)
        pixels = np.clip(pattern + draw.normal(0, 60, pattern.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        PillowImage.fromarray(pixels).save(file, "JPEG")
        yield {"image": {"bytes": file.getvalue(), "path": None}, "label": label}


def stored(count: int, classes: int, seed: int, folder: str) -> Dataset:
    """The images in a file, which is mapped and not read."""
    features = Features(image=Image(), label=ClassLabel(names=[f"class {row}" for row in range(classes)]))
    words = {"count": count, "classes": classes, "seed": seed}
    return Dataset.from_generator(images, features=features, gen_kwargs=words, cache_dir=folder)


class Watched(ContinualTrainer):
    """Writes what the head observes into a file, in its order, and notes the memory after each task."""

    def watch(self, path: Path) -> None:
        self.memory: list[float] = []
        self.labels: list[torch.Tensor] = []
        self.file = open(path, "wb")  # noqa: SIM115, closed at the end of the run
        head = self.tuner.head.active
        observe = head.observe

        def noted(features: torch.Tensor, labels: torch.Tensor, *more: Any) -> None:
            self.file.write(features.float().numpy().tobytes())
            self.labels.append(labels.to(torch.int32))
            observe(features, labels, *more)

        head.observe = noted

    def train_task(self, task: Any) -> Any:
        output = super().train_task(task)
        self.memory.append(memory_in_use())
        return output


def all_at_once(features: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Class means and covariance within classes by two passes over features (N, F) in a file, in float64."""
    counts, totals = np.bincount(labels, minlength=classes), np.zeros((classes, features.shape[1]))
    parts = np.array_split(np.arange(len(labels)), max(1, len(labels) // 50_000))
    for part in parts:
        np.add.at(totals, labels[part], features[part].astype(np.float64))
    means, scatter = totals / counts[:, None], np.zeros((features.shape[1],) * 2)
    for part in parts:
        centred = features[part].astype(np.float64) - means[labels[part]]
        scatter += centred.T @ centred
    return means, scatter / len(labels)


def logits_of(features: np.ndarray, means: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """LDA's, as in its textbook form (Hastie et al., eq. 4.10), with equal priors."""
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / len(covariance) * np.eye(
        len(covariance)
    )
    centre = means.mean(0)
    weight = np.linalg.solve(shrunk, (means - centre).T).T
    return (features - centre) @ weight.T - ((means - centre) * weight).sum(1) / 2


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    set_seed(0)
    began = time.perf_counter()
    data = {
        "train": stored(options.images, options.classes, 1, str(folder / "data")),
        "test": stored(options.test_images, options.classes, 2, str(folder / "data")),
    }
    made = time.perf_counter()
    size = {"image_size": SIZE, "patch_size": 8, "num_hidden_layers": 2, "num_labels": options.classes}
    width = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 4 * WIDTH}
    config = LinearProbeConfig(head="lda", head_options={"shrinkage": SHRINKAGE}, head_features="cls+mean")
    trainer = Watched(
        get_peft_model(ViTForImageClassification(ViTConfig(**size, **width)), config),
        ContinualTrainingArguments(
            str(folder / "run"),
            per_device_eval_batch_size=500,
            use_cpu=True,
            disable_tqdm=options.quiet,
            pictures=False,
            report_to="none",
        ),
        class_incremental(data, options.tasks, seed=0),
        processing_class=ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}),
    )
    trainer.watch(folder / "features")
    before = memory_in_use()
    ready = time.perf_counter()
    trainer.train()
    done = time.perf_counter()
    trainer.file.close()
    labels = torch.cat(trainer.labels).numpy()
    features = np.memmap(folder / "features", np.float32, "r").reshape(len(labels), -1)
    head, classes = trainer.tuner.head.active, trainer.scenario.classes
    sums = head.sums
    means, covariance = all_at_once(features, labels, len(classes))
    some = np.array(features[:: max(1, len(features) // 2000)], dtype=np.float64)
    expected = logits_of(some, means, covariance)
    with torch.no_grad():
        found = head(torch.from_numpy(some).float()).double().numpy()
    found, expected = (each - each.mean(1, keepdims=True) for each in (found, expected))
    tenth = max(1, options.tasks // 10)
    scale = np.sqrt(np.trace(covariance) / len(covariance))
    return {
        "classes": len(classes),
        "images": len(labels),
        "test_images": len(data["test"]),
        "tasks": options.tasks,
        "accuracy": trainer.metrics["average_accuracy"],
        "counts_are_exact": bool((sums.counts.numpy() == np.bincount(labels)).all()),
        "means_off": float(np.abs(sums.means.numpy() - means).max() / scale),
        "covariance_off": float(
            np.abs(sums.within().numpy() / len(labels) - covariance).max() / np.abs(covariance).max()
        ),
        "logits_off": float(np.abs(found - expected).max()),
        "same_answers": float((found.argmax(1) == expected.argmax(1)).mean()),
        "memory_before_mb": before,
        "memory_early_mb": trainer.memory[tenth - 1],
        "memory_end_mb": trainer.memory[-1],
        "memory_most_mb": max(trainer.memory),
        "head_mb": sum(value.nbytes for value in (*head.state_dict().values(), *head.going_on().values())) / 1e6,
        "seconds_making_images": made - began,
        "seconds_before_training": ready - made,
        "seconds": done - ready,
        "memory_mb": trainer.memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1_300_000, help="training images, of all classes together")
    parser.add_argument("--test-images", type=int, default=50_000, help="of all classes together")
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for 4 GB of files; default: a temporary one")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--json", type=Path, help="write the record into this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        row = measure(options, Path(folder))
    print(
        f"{row['images']:,} images of {row['classes']:,} classes in {row['tasks']} tasks, {row['test_images']:,} test "
        f"images: {row['seconds']:.0f} s ({row['seconds_before_training']:.0f} s before the first task), average "
        f"accuracy {100 * row['accuracy']:.1f}%"
    )
    print(
        f"memory: {row['memory_early_mb']:.0f} MB after a tenth of the tasks, {row['memory_end_mb']:.0f} MB at the "
        f"end ({row['memory_before_mb']:.0f} MB before); the head and its sums are {row['head_mb']:.1f} MB"
    )
    print(
        f"from all data at once: means {row['means_off']:.1e} of a standard deviation, covariance "
        f"{row['covariance_off']:.1e} of its largest entry, logits {row['logits_off']:.1e}, the same answer for "
        f"{100 * row['same_answers']:.2f}% of the images"
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
