"""The upper bound of the tables of `heads.py`: the whole backbone, fine-tuned on all tasks at once.

    python benchmarks/joint.py --data DATA/tiny-imagenet-cl --output benchmarks/results/heads/tiny-imagenet-cl
    python benchmarks/joint.py --scenario domain-incremental --data DATA/pacs --output benchmarks/results/heads/pacs

The stock `transformers.Trainer`, for it is no continual learning: rate 3e-4 with a warm-up of a tenth and a cosine,
batches of 25, five epochs, horizontal flips. Each task's test images are measured at the end. `heads.py --table`
prints the row.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import concatenate_datasets, load_dataset
from head_features import add_options, labels_of, make_scenario
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_cl import Scenario, to_rgb
from peft_cl.assets import default_backbone


class Images(torch.utils.data.Dataset):
    """Images of some tasks as the model takes them; those that are learnt are flipped half of the time."""

    def __init__(self, scenario: Scenario, tasks: list, split: str, flips: bool = False):
        processor = AutoImageProcessor.from_pretrained(default_backbone())
        images = concatenate_datasets([getattr(task, split) for task in tasks])[scenario.image_column]
        self.pixels = torch.cat(
            [processor(to_rgb(image), return_tensors="pt")["pixel_values"].half() for image in images]
        )
        self.labels = torch.cat([labels_of(scenario, task)[("train", "test").index(split)] for task in tasks])
        self.flips = flips

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> dict:
        pixels = self.pixels[place].float()
        if self.flips and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        return {"pixel_values": pixels, "labels": self.labels[place]}


def run(seed: int, options: argparse.Namespace) -> dict:
    """Fine-tune on everything; the mean accuracy over the tasks and the seconds of the processor."""
    scenario = make_scenario(load_dataset(options.data), seed, options)
    set_seed(seed)
    model = AutoModelForImageClassification.from_pretrained(
        default_backbone(), num_labels=len(scenario.classes), ignore_mismatched_sizes=True, dtype="float32"
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.work / f"joint-seed{seed}"),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=25,
            per_device_eval_batch_size=100,
            learning_rate=3e-4,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            seed=seed,
            use_cpu=not torch.accelerator.is_available(),
            disable_tqdm=options.quiet,
        ),
        train_dataset=Images(scenario, list(scenario), "train", flips=True),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    began = time.process_time()
    trainer.train()
    seconds = time.process_time() - began
    accuracies = [trainer.evaluate(Images(scenario, [task], "test"))["eval_accuracy"] for task in scenario]
    return {"accuracy": sum(accuracies) / len(accuracies), "accuracies": accuracies, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--work", type=Path, default=Path("out/joint"), help="the trainer's own folder")
    parser.add_argument("--epochs", type=float, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        path = options.output / f"joint-seed{seed}.json"
        if not path.is_file():
            path.write_text(json.dumps(run(seed, options), indent=1) + "\n")
        print(f"seed {seed}: {100 * json.loads(path.read_text())['accuracy']:.2f}", flush=True)


if __name__ == "__main__":
    main()
