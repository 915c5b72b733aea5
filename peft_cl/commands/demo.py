"""`peft-cl demo`: the methods side by side on small real images, in minutes on a CPU and without a network."""

from __future__ import annotations

import argparse
import importlib.util
import time
from dataclasses import dataclass, field
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
from ..text import percent
from ..trainer import ContinualTrainer, ContinualTrainingArguments
from ..tuners.base.config import PromptPoolConfig
from .digits import load_digits_dataset
from .errors import CommandError, explained
from .methods import METHODS
from .output import say
from .train import clear


TASKS = 5
BATCH_SIZE = 16


@dataclass(frozen=True)
class Setting:
    """A method, and how it is trained here.

    Rates and epochs of those with a linear head were chosen by a few trials on these very test images, with the seeds
    0 and 1. A demonstration, no benchmark. The preset "best" is as it comes.
    """

    method: str
    learning_rate: float
    epochs: int
    preset: str | None = None
    adapter: dict[str, Any] = field(default_factory=dict)
    pool_rate: float | None = None  # learning rate of prompts and keys where it is not the head's


SETTINGS = {
    "frozen-best": Setting("frozen", 0.0, 1, "best"),
    "coda-best": Setting("coda", 2e-3, 3, "best"),
    "coda": Setting("coda", 5e-3, 3, None, {"head_init": "zeros", "components_per_task": 4}),
    "linear-probe": Setting("linear-probe", 5e-3, 3, None, {"head_init": "zeros"}),
    "nearest-class-mean": Setting("nearest-class-mean", 0.0, 1),
    "fine-tuning": Setting("fine-tuning", 3e-4, 1),
}
#: The row of which a picture is classified at the end.
SHOWN = "coda-best"


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
    say(introduction(scenario, arguments.seed), flush=True)
    runs = {}
    for number, name in enumerate(SETTINGS, start=1):
        say(f"\n[{number}/{len(SETTINGS)}] {describe(name, arguments.quick)}", flush=True)
        runs[name] = train(name, scenario, output / name, arguments.seed, arguments.quick)
    say(f"\n{results_table(runs.values())}\n| Guessing | {percent(1 / len(scenario.classes), 2)} | | | | |\n")
    say(conclusion(runs, arguments.quick))
    if importlib.util.find_spec("matplotlib"):
        plot_comparison(list(runs.values()), path=output / "comparison.png")
        say(f"Picture: {output / 'comparison.png'}")
    else:
        say("No picture: it needs matplotlib, `pip install peft-cl[plots]`.")
    say(use(output / SHOWN, scenario, arguments.seed))
    say(f"All of it took {time.perf_counter() - began:.0f} s. Adapters, results and cards are in {output}.")


def introduction(scenario: Scenario, seed: int) -> str:
    facts = scenario.describe()
    tasks = "; ".join(", ".join(task.classes) for task in scenario)
    return (
        "Continual learning of handwritten digits: 8 x 8 pixels, scaled up to 64 x 64, from scikit-learn.\n"
        f"{len(scenario)} tasks one after the other, with the digits {tasks}; "
        f"{sum(facts['train_sizes']):,} training and {sum(facts['test_sizes']):,} test images.\n"
        "A task's images are never seen again, and the test does not say which task an image is from.\n"
        f"Backbone: vit-tiny-64, 2.7 M parameters, which has seen photographs only. Seed {seed}, batches of "
        f"{BATCH_SIZE}, {backbone_dtype('coda')} where the backbone is frozen."
    )


def describe(name: str, quick: bool) -> str:
    setting = SETTINGS[name]
    title = configured(name).title if setting.preset else METHODS[setting.method].title
    if setting.method == "nearest-class-mean":
        return f"{title}: no training, the mean feature of each class"
    if setting.method == "frozen":
        return f"{title}: no training, class means and a covariance of frozen features, preset best"
    length = "2 steps" if quick else f"{setting.epochs} epoch{'s' if setting.epochs > 1 else ''}"
    task = "on the first task, then frozen" if setting.preset else "a task"
    changed = "".join(f", {key} {value}" for key, value in setting.adapter.items())
    pool = f" ({setting.pool_rate:g} for prompts and keys)" if setting.pool_rate else ""
    preset = f", preset {setting.preset}" if setting.preset else ""
    rate = f"AdamW, constant learning rate {setting.learning_rate:g}{pool}"
    return f"{title}: {length} {task}, {rate}{preset}{changed}"


def configured(name: str) -> PromptPoolConfig:
    setting = SETTINGS[name]
    return METHODS[setting.method].configure(setting.preset, **setting.adapter)


def backbone_dtype(name: str) -> str:
    """bfloat16 for a frozen backbone where the processor computes in it; without that it would be slower."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # recent torch only
    has_bfloat16 = torch.cuda.is_available() or capabilities.get("avx512_bf16", False)
    trains = METHODS[SETTINGS[name].method].trains_backbone
    return "bfloat16" if has_bfloat16 and not trains else "float32"


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
    setting = SETTINGS[name]
    clear(folder)
    set_seed(seed)
    trainer = ContinualTrainer(
        get_peft_model(load(backbone_dtype(name)), configured(name)),
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
        strategy=METHODS[setting.method].strategy_class(),
    )
    trainer.train()
    return trainer.results


def accuracy(results: RunResults) -> float:
    return results.metrics["average_accuracy"]


def conclusion(runs: dict[str, RunResults], quick: bool) -> str:
    """Say in words what the table shows, whatever it is."""
    if quick:
        return "With --quick the methods see too little to be compared.\n"
    kept = {name: f"{run.method} keeps {percent(accuracy(run))}%" for name, run in runs.items()}
    tuned = runs["fine-tuning"]
    best = [name for name in runs if SETTINGS[name].preset]
    return (
        f"Fine-tuning all weights forgets: {percent(accuracy(tuned), 0)}% of the digits are right at the end, "
        f"and it has lost {percent(tuned.metrics['forgetting'], 0)}%.\n"
        "A linear head that is trained task by task never compares two tasks: "
        f"{kept['linear-probe']}, and as published {kept['coda']}.\n"
        f'The preset "best" computes the head from sums over features, so that nothing is forgotten:\n'
        f"{', '.join(kept[name] for name in best)}.\n"
        f"{_gain(runs)}\n"
        "Rates of the trained heads were chosen on these very images: a demonstration, no benchmark.\n"
    )


def _gain(runs: dict[str, RunResults]) -> str:
    """What prompts add to the same head."""
    prompted = [name for name in runs if SETTINGS[name].preset and name != "frozen-best"]
    best = max(prompted, key=lambda name: accuracy(runs[name]))
    points = 100 * (accuracy(runs[best]) - accuracy(runs["frozen-best"]))
    if points < 0.5:
        return f"On these images prompts add nothing to that head ({points:+.1f} points): it needs none here."
    return f"To that head prompts add {points:.1f} points here ({runs[best].method})."


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
