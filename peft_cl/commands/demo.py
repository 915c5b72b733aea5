"""`peft-cl demo`: the methods side by side on small real images, in minutes on a CPU and without a network."""

from __future__ import annotations

import argparse
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed
from transformers.utils import logging

from ..assets import default_backbone
from ..metrics import RunResults, results_table
from ..plots import plot_comparison
from ..scenarios import Scenario, class_incremental
from ..trainer import ContinualTrainer, ContinualTrainingArguments
from .digits import load_digits_dataset
from .errors import CommandError, explained
from .methods import METHODS
from .train import clear


TASKS = 5
BATCH_SIZE = 16


@dataclass(frozen=True)
class Setting:
    """How a method is trained here.

    Rates and epochs were chosen by a few trials on these very test images, with the seeds 0 and 1. A demonstration, no
    benchmark.
    """

    adapter: dict[str, Any]
    learning_rate: float
    epochs: int
    pool_rate: float | None = None  # learning rate of prompts and keys where it is not the head's
    is_prompt: bool = True


SETTINGS = {
    "l2p": Setting({"head_init": "zeros"}, 5e-3, 3, pool_rate=3e-4),
    "dualprompt": Setting({"head_init": "zeros"}, 2e-3, 3, pool_rate=2e-2),
    "coda": Setting({"head_init": "zeros", "components_per_task": 4}, 5e-3, 3),
    "linear-probe": Setting({"head_init": "zeros"}, 5e-3, 3, is_prompt=False),
    "fine-tuning": Setting({}, 3e-4, 1, is_prompt=False),
    "nearest-class-mean": Setting({}, 0.0, 1, is_prompt=False),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="out/demo", metavar="DIR", help="folder to write (default: out/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the adapters and the order (default: 0)")
    parser.add_argument("--quick", action="store_true", help="few images and steps: shows the way, not the methods")


def run(arguments: argparse.Namespace) -> None:
    began = time.perf_counter()
    output = Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output is {str(output)!r}, but that is a file. Give a folder.")
    with explained("The demo's images cannot be loaded"):
        scenario = class_incremental(load_digits_dataset(arguments.seed, 16 if arguments.quick else None), TASKS)
    print(introduction(scenario, arguments.seed), flush=True)
    runs = {}
    for number, name in enumerate(SETTINGS, start=1):
        print(f"\n[{number}/{len(SETTINGS)}] {describe(name, arguments.quick)}", flush=True)
        runs[name] = train(name, scenario, output / name, arguments.seed, arguments.quick)
    print(f"\n{results_table(runs.values())}\n| Guessing | {100 / len(scenario.classes):.2f} | | | | |\n")
    print(conclusion(runs, arguments.quick))
    if importlib.util.find_spec("matplotlib"):
        plot_comparison(list(runs.values()), path=output / "comparison.png")
        print(f"Picture: {output / 'comparison.png'}")
    else:
        print("No picture: it needs matplotlib, `pip install peft-cl[plots]`.")
    best = max((name for name in runs if SETTINGS[name].is_prompt), key=lambda name: accuracy(runs[name]))
    print(use(output / best, scenario, arguments.seed))
    print(f"All of it took {time.perf_counter() - began:.0f} s. Adapters, results and cards are in {output}.")


def introduction(scenario: Scenario, seed: int) -> str:
    facts = scenario.describe()
    tasks = "; ".join(", ".join(task.classes) for task in scenario)
    return (
        "Continual learning of handwritten digits: 8 x 8 pixels, scaled up to 64 x 64, from scikit-learn.\n"
        f"{len(scenario)} tasks one after the other, with the digits {tasks}; "
        f"{sum(facts['train_sizes']):,} training and {sum(facts['test_sizes']):,} test images.\n"
        "A task's images are never seen again, and the test does not say which task an image is from.\n"
        f"Backbone: vit-tiny-64, 2.7 M parameters, which has seen photographs only. Seed {seed}, batches of "
        f"{BATCH_SIZE}, {backbone_dtype('l2p')} where the backbone is frozen."
    )


def describe(name: str, quick: bool) -> str:
    method, setting = METHODS[name], SETTINGS[name]
    if name == "nearest-class-mean":
        return f"{method.title}: no training, the mean feature of each class"
    length = "2 steps" if quick else f"{setting.epochs} epoch{'s' if setting.epochs > 1 else ''}"
    changed = "".join(f", {key} {value}" for key, value in setting.adapter.items())
    pool = f" ({setting.pool_rate:g} for prompts and keys)" if setting.pool_rate else ""
    return f"{method.title}: {length} a task, AdamW, constant learning rate {setting.learning_rate:g}{pool}{changed}"


def backbone_dtype(name: str) -> str:
    """bfloat16 for a frozen backbone where the processor computes in it; without that it would be slower."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # recent torch only
    has_bfloat16 = torch.cuda.is_available() or capabilities.get("avx512_bf16", False)
    return "bfloat16" if has_bfloat16 and not METHODS[name].trains_backbone else "float32"


def load(dtype: str) -> Any:
    """The embedded backbone; its small size makes the bar of its loading a flicker between the lines."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # At 64 patches, eager attention is the fastest here.
        return AutoModelForImageClassification.from_pretrained(
            default_backbone(), dtype=dtype, attn_implementation="eager"
        )
    finally:
        if shown:
            logging.enable_progress_bar()


def train(name: str, scenario: Scenario, folder: Path, seed: int, quick: bool) -> RunResults:
    """Learn the tasks by one method and write its folder, over an earlier demo's."""
    method, setting = METHODS[name], SETTINGS[name]
    clear(folder)
    set_seed(seed)
    trainer = ContinualTrainer(
        get_peft_model(load(backbone_dtype(name)), method.configure(**setting.adapter)),
        ContinualTrainingArguments(
            str(folder),
            num_train_epochs=setting.epochs,
            max_steps=2 if quick else -1,
            learning_rate=setting.learning_rate,
            learning_rates={"pool": setting.pool_rate} if setting.pool_rate else None,
            lr_scheduler_type="constant",
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=128,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
            report_to="none",
            pictures=False,
        ),
        scenario,
        processing_class=AutoImageProcessor.from_pretrained(default_backbone()),
        strategy=method.strategy_class(),
    )
    trainer.train()
    return trainer.results


def accuracy(results: RunResults) -> float:
    return results.metrics["average_accuracy"]


def conclusion(runs: dict[str, RunResults], quick: bool) -> str:
    """Say in words what the table shows, whatever it is."""
    if quick:
        return "With --quick the methods see too little to be compared.\n"
    best = max(runs, key=lambda name: accuracy(runs[name]))
    tuned = runs["fine-tuning"]
    prompts = [f"{runs[name].method} keeps {accuracy(runs[name]):.0%}" for name in runs if SETTINGS[name].is_prompt]
    return (
        f"Fine-tuning all weights forgets: {accuracy(tuned):.0%} of the digits are right at the end, and it has lost "
        f"{tuned.metrics['forgetting']:.0%}.\nOf the prompt methods, {', '.join(prompts)}.\n"
        f"Best of all: {runs[best].method} with {accuracy(runs[best]):.0%}.\n"
        "The settings were chosen on these very images: a demonstration, no benchmark.\n"
    )


def use(folder: Path, scenario: Scenario, seed: int) -> str:
    """Load an adapter from disk as anybody would, and classify one test image."""
    model = PeftModel.from_pretrained(load("float32"), str(folder)).eval()
    processor = AutoImageProcessor.from_pretrained(str(folder))
    task = scenario[seed % len(scenario)]
    example = task.test[seed % len(task.test)]
    image: Image.Image = example[scenario.image_column]
    with torch.no_grad():
        logits = model(**processor(image, return_tensors="pt")).logits
    probability, row = logits.softmax(-1).max(-1)
    return (
        f"Loaded {folder} with PeftModel.from_pretrained on a fresh backbone. One test image, of the digit "
        f"{scenario.label_names[example[scenario.label_column]]}: the model says {model.config.id2label[row.item()]} "
        f"(probability {probability.item():.0%})."
    )
