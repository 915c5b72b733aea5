"""Halves of a task sequence learnt apart and joined, against the whole sequence and against each half alone.

    python benchmarks/joining.py DATA/tiny-imagenet-cl --seeds 0 1 2
    python benchmarks/joining.py DATA/tiny-imagenet-cl --classes 40 --num-tasks 4 --seeds 0 --holdout   # to choose by
    python benchmarks/joining.py DATA/tiny-imagenet-cl --table    # only print what is there

Each method learns the first half of the tasks, the second half, and all tasks, on the embedded backbone with the
settings of `examples/suites/tiny-imagenet.yaml`. The halves are joined by `join_adapters`, in each of its ways. What
has been measured is kept in `--output`; adapters, in `--work`, are not trained twice. With `--holdout`, accuracies are
those of training images that nothing was learnt from.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from heads import spread
from peft import PeftModel, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from peft_cl import (
    CodaPromptConfig,
    ContinualTrainer,
    ContinualTrainingArguments,
    DualPromptConfig,
    L2PConfig,
    LinearProbeConfig,
    class_incremental,
    join_adapters,
)
from peft_cl.assets import default_backbone
from peft_cl.scenarios import ImageTransform
from peft_cl.trainer.choosing import share_of_each_class


@dataclass(frozen=True)
class Entry:
    """A row of the table: a method's configuration, and how it is trained."""

    title: str
    config: type
    preset: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def ways(self) -> tuple[str, ...]:
        """How its adapters may be joined."""
        return ("together",) if self.config is LinearProbeConfig else ("apart", "together")


ZEROS = {"head_init": "zeros"}
PREFIX = {"prompt_type": "prefix", "prompt_length": 4, "layers": [0, 1, 2, 3, 4], "keys_per_layer": True}


def best(rate: float) -> dict[str, Any]:
    return {"num_train_epochs": 5, "learning_rates": {"pool": rate}}


METHODS = {
    "frozen": Entry("Frozen features, best", LinearProbeConfig, "best"),
    "linear-probe": Entry("Linear probe", LinearProbeConfig, None, ZEROS),
    "l2p-best": Entry("L2P, best", L2PConfig, "best", {}, best(1e-2)),
    "dualprompt-best": Entry("DualPrompt, best", DualPromptConfig, "best", {}, best(6e-2)),
    "coda-best": Entry("CODA-Prompt, best", CodaPromptConfig, "best", {}, best(5e-3)),
    "l2p": Entry(
        "L2P, as published",
        L2PConfig,
        "google",
        {**ZEROS, **PREFIX, "head_type": "cls"},
        {"learning_rates": {"pool": 3e-3}},
    ),
    "dualprompt": Entry("DualPrompt, as published", DualPromptConfig, "paper", {}, {"learning_rates": {"pool": 3e-3}}),
    "coda": Entry(
        "CODA-Prompt, as published", CodaPromptConfig, "official", ZEROS, {"learning_rates": {"pool": 1e-3}}
    ),
}
IMAGES_PER_CLASS = 50


# ------------------------------------------------------------------------------------------------------- training


def learn(entry: Entry, data: dict[str, Dataset], order: Sequence[str], tasks: int, folder: Path, seed: int) -> None:
    """Train one adapter on `tasks` equal tasks of the classes in `order`, unless it is there."""
    if (folder / "finished").is_file():
        return
    set_seed(seed)
    backbone = default_backbone()
    config = (
        entry.config.from_preset(entry.preset, **entry.settings) if entry.preset else entry.config(**entry.settings)
    )
    arguments = ContinualTrainingArguments(
        str(folder),
        per_device_train_batch_size=10,
        per_device_eval_batch_size=250,
        lr_scheduler_type="constant",
        learning_rate=1e-3,
        logging_steps=50,
        seed=seed,
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
        pictures=False,
        query_cache_dir=str(folder.parents[1] / "cache" / "queries"),
        image_cache_dir=str(folder.parents[1] / "cache" / "images"),
        **{"num_train_epochs": 1, **entry.training},
    )
    trainer = ContinualTrainer(
        get_peft_model(AutoModelForImageClassification.from_pretrained(backbone), config),
        arguments,
        class_incremental(data, tasks, class_order=list(order)).with_images_per_class(IMAGES_PER_CLASS),
        processing_class=AutoImageProcessor.from_pretrained(backbone),
    )
    trainer.train()
    (folder / "finished").touch()


def split_of(data: Any, options: argparse.Namespace) -> dict[str, Dataset]:
    """The training images, and the test images or, in their place, training images held back."""
    if not options.holdout:
        return {"train": data["train"], "test": data["test"]}
    held = share_of_each_class(np.array(data["train"]["label"]), 0.2, 0)
    parts = {"train": ~held, "test": held}
    return {name: data["train"].select(np.flatnonzero(rows)) for name, rows in parts.items()}


# ------------------------------------------------------------------------------------------------------- measuring


class Pictures:
    """Test images of some classes as the model takes them, and the names of their classes."""

    def __init__(self, examples: Dataset, classes: Sequence[str]):
        names = examples.features["label"].names
        rows = [row for row, label in enumerate(examples["label"]) if names[label] in set(classes)]
        chosen = examples.select(rows)
        self.names = np.array([names[label] for label in chosen["label"]])
        processor = AutoImageProcessor.from_pretrained(default_backbone())
        self.pixels = ImageTransform(processor)(chosen["image"])

    @torch.no_grad()
    def accuracy(self, model: PeftModel, classes: Sequence[str]) -> float:
        """Percent of the images of `classes` that the active adapter is right about."""
        rows = np.isin(self.names, list(classes))
        learnt = np.array(model.peft_config[model.active_adapter].classes)
        parts = [model(part).logits.argmax(-1) for part in self.pixels[torch.from_numpy(rows)].split(250)]
        return 100 * float((learnt[torch.cat(parts).numpy()] == self.names[rows]).mean())


def measure(entry: Entry, folders: dict[str, Path], halves: list[list[str]], pictures: Pictures) -> dict[str, float]:
    """Accuracies of the sequence, of each half on its own classes, and of the joined adapters."""
    whole = [name for half in halves for name in half]
    base = AutoModelForImageClassification.from_pretrained(default_backbone())
    model = PeftModel.from_pretrained(base, folders["whole"], "whole").eval()
    found = {"sequence": pictures.accuracy(model, whole)}
    for name, half in zip(("first", "second"), halves, strict=True):
        model.load_adapter(folders[name], name)
        model.set_adapter(name)
        found[f"{name} half"] = pictures.accuracy(model, half)
    for way in entry.ways:
        join_adapters(model, ["first", "second"], way, prompts=way)
        model.set_adapter(way)
        found[f"joined {way}"] = pictures.accuracy(model.eval(), whole)
    return found


def run(name: str, seed: int, data: Any, options: argparse.Namespace) -> dict[str, float]:
    entry, parts = METHODS[name], split_of(data, options)
    names = parts["train"].features["label"].names
    order = [names[label] for label in np.random.default_rng(seed).permutation(len(names))[: options.classes]]
    halves = [order[: len(order) // 2], order[len(order) // 2 :]]
    folders = {part: options.work / f"{name}-seed{seed}" / part for part in ("whole", "first", "second")}
    learn(entry, parts, order, options.num_tasks, folders["whole"], seed)
    for part, half in zip(("first", "second"), halves, strict=True):
        learn(entry, parts, half, options.num_tasks // 2, folders[part], seed)
        gc.collect()
    return measure(entry, folders, halves, Pictures(parts["test"], order))


# ------------------------------------------------------------------------------------------------------- the table


def table(options: argparse.Namespace) -> str:
    """The records in `--output`: mean and deviation over the seeds."""
    columns = ("sequence", "joined apart", "joined together", "first half", "second half")
    titles = ("Sequence", "Joined, apart", "Joined, together", "First half, its classes", "Second half, its classes")
    lines = [f"| Method | {' | '.join(titles)} |", "|---" + "|---:" * len(titles) + "|"]
    for name, entry in METHODS.items():
        records = [json.loads(path.read_text()) for path in sorted(options.output.glob(f"{name}-seed*.json"))]
        if records:
            cells = [spread([record[column] for record in records if column in record]) for column in columns]
            lines.append(f"| {entry.title} (n = {len(records)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder or Hub name of an image data set")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/joining"), help="records go there")
    parser.add_argument("--work", type=Path, default=Path("out/joining"), help="adapters go there")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the class order and the training")
    parser.add_argument("--classes", type=int, default=100, help="how many of the classes are learnt")
    parser.add_argument("--num-tasks", type=int, default=10)
    parser.add_argument("--holdout", action="store_true", help="measure on training images held back")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    data = None if options.table else load_dataset(options.data)
    for seed in options.seeds if data else ():
        for name in options.methods:
            path = options.output / f"{name}-seed{seed}.json"
            if not path.is_file():
                path.write_text(json.dumps(run(name, seed, data, options), indent=1) + "\n")
            print(f"{path.stem}: {json.loads(path.read_text())}", flush=True)
    print(table(options))


if __name__ == "__main__":
    main()
