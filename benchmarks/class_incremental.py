"""Class-incremental learning of real images: every method, several class orders, one table.

    python benchmarks/class_incremental.py --data DATA/tiny-imagenet-cl --output benchmarks/results/tiny-imagenet-cl

Each run's `results.json` is written as it goes and a finished run is not repeated, so the command can be stopped and
started again. `--table` prints the table of what is there.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from peft_cl import (
    CodaPromptConfig,
    ContinualTrainer,
    ContinualTrainingArguments,
    DualPromptConfig,
    L2PConfig,
    LinearProbeConfig,
    RunResults,
    Strategy,
    class_incremental,
    results_table,
)
from peft_cl.assets import default_backbone
from peft_cl.hub import model_card
from peft_cl.strategies import FineTuning, NearestClassMean


@dataclass(frozen=True)
class Entry:
    """One row of the table: the adapter, how it is trained, and the precision of the backbone."""

    config: type
    adapter: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    strategy: type[Strategy] = Strategy
    dtype: torch.dtype = torch.bfloat16


LIMITS = "Backbone and images derive from Tiny-ImageNet, and so from ImageNet, whose terms allow research use."

# One head for all: rows begin at zero, rate 1e-3 (the best of 5e-4 to 5e-3 for the linear probe alone). The same
# masked loss, batch, epochs and schedule for all that are trained; fine-tuning alone keeps float32 weights and takes
# the plain loss over the classes seen, which is what makes it naive.
HEAD = {"head_init": "zeros"}
METHODS = {
    "coda": Entry(CodaPromptConfig, HEAD, {"learning_rates": {"pool": 2e-3}}),
    "dualprompt": Entry(DualPromptConfig, HEAD, {"learning_rates": {"pool": 2e-2}}),
    "l2p": Entry(L2PConfig, HEAD, {"learning_rates": {"pool": 2e-2}}),
    "linear-probe": Entry(LinearProbeConfig, HEAD),
    "nearest-class-mean": Entry(LinearProbeConfig, HEAD, strategy=NearestClassMean),
    "fine-tuning": Entry(
        LinearProbeConfig,
        {**HEAD, "train_mask": False},
        {"learning_rate": 3e-4, "bf16": True},
        FineTuning,
        torch.float32,
    ),
}


def run(name: str, seed: int, data: Any, options: argparse.Namespace, folder: Path) -> RunResults:
    """Train and measure one method on one class order."""
    entry = METHODS[name]
    set_seed(seed)
    backbone = default_backbone()
    model = AutoModelForImageClassification.from_pretrained(backbone, dtype=entry.dtype, attn_implementation="eager")
    arguments = ContinualTrainingArguments(
        str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=250,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        logging_steps=50,
        seed=seed,
        use_cpu=options.cpu,
        disable_tqdm=options.quiet,
        **{"learning_rate": 1e-3, **entry.training},
    )
    trainer = ContinualTrainer(
        get_peft_model(model, entry.config(**entry.adapter)),
        arguments,
        class_incremental(data, num_tasks=options.num_tasks, seed=seed),
        processing_class=AutoImageProcessor.from_pretrained(backbone),
        strategy=entry.strategy(),
    )
    trainer.train()
    return trainer.results


def write_cards(options: argparse.Namespace) -> None:
    """The model card of each trained adapter of the first seed, from its own record."""
    options.cards.mkdir(parents=True, exist_ok=True)
    for name in options.methods:
        folder = options.output / f"{name}-seed{options.seeds[0]}"
        if METHODS[name].strategy is Strategy and (results := finished(folder)) is not None:
            # The saved record names the command that anyone can repeat, not the options of one machine.
            command = f"python benchmarks/class_incremental.py --methods {name} --seeds {options.seeds[0]} ..."
            card = model_card(replace(results, command=command), limits=[LIMITS])
            (options.cards / f"{name}-{options.output.name}.md").write_text(card)


def finished(folder: Path) -> RunResults | None:
    """The record of a run that is through, if there is one."""
    if not (folder / "results.json").is_file():
        return None
    results = RunResults.load(folder)
    return results if results.finished_tasks == len(results.task_names) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder or Hub name of an image data set")
    parser.add_argument("--output", type=Path, required=True, help="a folder for each method and seed goes there")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the class order and the training")
    parser.add_argument("--num-tasks", type=int, default=10)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is an accelerator")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--cards", type=Path, help="write the trained adapters' cards into this folder")
    parser.add_argument("--table", action="store_true", help="only print the table of the finished runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = None if options.table else load_dataset(options.data)
    for seed in options.seeds:
        for name in options.methods:
            folder = options.output / f"{name}-seed{seed}"
            if not options.table and finished(folder) is None:
                results = run(name, seed, data, options, folder)
                print(f"{name} seed {seed}: {results.metrics}", flush=True)
                gc.collect()
    runs = [
        results
        for name in options.methods
        for seed in options.seeds
        if (results := finished(options.output / f"{name}-seed{seed}")) is not None
    ]
    print(results_table(runs))
    if options.cards:
        write_cards(options)


if __name__ == "__main__":
    main()
