"""How far the preset "best" can be relied on: calibration, images of classes never seen, and abstaining.

    python benchmarks/reliability.py --data DATA/tiny-imagenet-cl \
        --json benchmarks/results/reliability/tiny-imagenet-cl.json
    python benchmarks/reliability.py --scenario domain-incremental --data DATA/pacs \
        --json benchmarks/results/reliability/pacs.json
    python benchmarks/reliability.py --data digits --images-per-class 8 --methods none --seeds 0    # a trial

Half of the classes, drawn by the seed, are learnt task after task from `--images-per-class` images of each. Other
training images of these classes are held out; the temperature is fitted on them. NLL, calibration error and accuracies
are of the test images of the classes learnt, before and after the scaling; AUROC says how well each score tells them
from the test images of the other half of the classes, which were never seen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from head_features import METHODS, add_options, column, learn_prompts, method_of
from torch.utils.data import DataLoader

from peft_cl import ContinualTrainer
from peft_cl.commands.digits import load_digits_dataset
from peft_cl.reliability import (
    COVERAGES,
    SCORES,
    accuracy_at_coverage,
    auroc,
    expected_calibration_error,
    fit_temperature,
    max_probability,
    negative_log_likelihood,
    score_images,
    separation,
)
from peft_cl.scenarios import ContinualCollator, ImageTransform


#: The greatest probability of logits that were divided by the temperature.
SCALED = "max_probability, scaled"


def divided(data: Any, seed: int, options: argparse.Namespace) -> dict[str, Dataset]:
    """Images to learn from (`train`), held out, and of the test: of known classes, and of others."""
    rng = np.random.default_rng(seed)
    labels = {split: np.array(data[split]["label"]) for split in ("train", "test")}
    classes = rng.permutation(np.unique(labels["train"]))
    is_known = {split: np.isin(of_split, classes[: len(classes) // 2]) for split, of_split in labels.items()}
    # With domains, so many images of each class in each domain.
    groups = labels["train"].astype(str)
    if options.scenario == "domain-incremental":
        groups = np.char.add(groups, np.char.add("/", np.array(data["train"]["domain"]).astype(str)))
    order = rng.permutation(np.flatnonzero(is_known["train"]))
    learnt, held_out = [], []
    for group in np.unique(groups[order]):
        rows = order[groups[order] == group]
        # Where there are few, as many are held out as there can be with one to learn from.
        count = min(options.images_per_class, max(1, len(rows) - options.held_out))
        learnt += rows[:count].tolist()
        held_out += rows[count : count + options.held_out].tolist()
    tested = [
        rng.permutation(np.flatnonzero(labels["test"] == label))[: options.test_images] for label in sorted(classes)
    ]
    tested = np.sort(np.concatenate(tested))
    return {
        "train": data["train"].select(sorted(learnt)),
        "held_out": data["train"].select(sorted(held_out)),
        "test": data["test"].select(tested[is_known["test"][tested]]),
        "unknown": data["test"].select(tested[~is_known["test"][tested]]),
    }


@torch.no_grad()
def logits_of(model: torch.nn.Module, batches: DataLoader) -> tuple[torch.Tensor, np.ndarray]:
    """(images, classes), and the row of each image's class."""
    found = [
        (model(batch["pixel_values"].to(model.device)).logits.double().cpu(), batch["labels"]) for batch in batches
    ]
    logits, labels = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(labels).numpy()


def measure(method: str, seed: int, data: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Learn by a method; everything that is measured of it."""
    parts = divided(data, seed, options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have no training examples")  # that is what they are left out for
        trainer = learn_prompts(method, seed, parts, options, kind=ContinualTrainer, settings={})
    trainer.train()
    model, scenario = trainer.model.eval(), trainer.scenario
    transform = ImageTransform(trainer.processing_class)

    def batches(part: str) -> DataLoader:
        index = np.zeros(len(scenario.label_names)) if part == "unknown" else scenario.label_index()
        collator = ContinualCollator(transform, index, scenario.image_column, label_names=scenario.label_names)
        return DataLoader(parts[part], 100, collate_fn=collator)

    logits, labels = {}, {}
    for part in ("held_out", "test", "unknown"):
        logits[part], labels[part] = logits_of(model, batches(part))
    temperature = fit_temperature(logits["held_out"], labels["held_out"])
    scaled = {part: values / temperature for part, values in logits.items()}
    test, truth = logits["test"], labels["test"]
    correct = test.argmax(-1).numpy() == truth
    found = separation(*(score_images(model, batches(part)) for part in ("test", "unknown")))
    confidence = {part: max_probability(scaled[part]).numpy() for part in ("test", "unknown")}
    return {
        "method": method,
        "title": method_of(method).title,
        "seed": seed,
        "classes": [len(scenario.classes), len(np.unique(parts["unknown"]["label"]))],
        "tasks": len(scenario),
        "images": {part: len(examples) for part, examples in parts.items()},
        "train_seconds": trainer.train_seconds,
        "accuracy": float(correct.mean()),
        "temperature": temperature,
        "nll": [negative_log_likelihood(test, truth, each) for each in (1.0, temperature)],
        "ece": [expected_calibration_error(each.softmax(-1).numpy(), truth) for each in (test, scaled["test"])],
        "auroc": {
            **{name: values["auroc"] for name, values in found.items()},
            SCALED: auroc(confidence["test"], confidence["unknown"]),
        },
        "false_positive_rate_at_95": {name: each["false_positive_rate_at_95"] for name, each in found.items()},
        "coverage": {f"{share:g}": accuracy_at_coverage(confidence["test"], correct, share) for share in COVERAGES},
    }


def table(rows: list[dict[str, Any]], methods: list[str]) -> str:
    """A line for each method, means over its seeds."""
    names = [*SCORES, SCALED]
    shares = [f"{share:.0%} predicted" for share in COVERAGES]
    headings = ["Method", "NLL", "NLL, scaled", "ECE (%)", "ECE, scaled (%)", *(f"AUROC {name} (%)" for name in names)]
    headings += [f"Accuracy (%), {share}" for share in shares]
    lines = [f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        cells = [f"{method_of(method).title} (n = {len(own)})"]
        cells += [f"{fmean(row['nll'][place] for row in own):.3f}" for place in (0, 1)]
        cells += [f"{100 * fmean(row['ece'][place] for row in own):.2f}" for place in (0, 1)]
        cells += [
            f"{100 * fmean(row['auroc'][name] for row in own):.2f}" if name in own[0]["auroc"] else "–"
            for name in names
        ]
        cells += [f"{100 * fmean(row['coverage'][f'{share:g}'] for row in own):.2f}" for share in COVERAGES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_options(parser, output=False)
    parser.set_defaults(num_tasks=5)
    parser.add_argument(
        "--methods",
        nargs="+",
        type=column,
        default=["coda", "none"],
        help=f"{', '.join(METHODS)}, or one of them with another rate of the pool (coda@0.01)",
    )
    parser.add_argument("--images-per-class", type=int, default=50, help="to learn from, in each domain")
    parser.add_argument("--held-out", type=int, default=20, help="further training images of a class")
    parser.add_argument("--test-images", type=int, help="at most so many of each class; None: all")
    parser.add_argument("--epochs", type=int, help="of each task; each method has its own")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_digits_dataset() if options.data == "digits" else load_dataset(options.data)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        options.work = Path(folder)  # of the trainers
        for seed in options.seeds:
            for method in options.methods:
                rows.append(measure(method, seed, data, options))
                if options.json:
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows, options.methods))


if __name__ == "__main__":
    main()
