"""Sequences of real images: every method, several class orders, one table.

    python benchmarks/sequences.py --data DATA/tiny-imagenet-cl --output benchmarks/results/tiny-imagenet-cl
    python benchmarks/sequences.py --scenario task-free --data DATA/tiny-imagenet-cl --output benchmarks/results/stream
    python benchmarks/sequences.py --scenario domain-incremental --data DATA/pacs --output benchmarks/results/pacs

Each run's `results.json` is written as it goes and a finished run is not repeated, so the command can be stopped and
started again; several commands, for a method and a seed each, may run side by side. `--table` prints the table of what
is there. Task evidence changes the evaluation alone, so a method
that has it is measured with it and without it in one training.
"""

from __future__ import annotations

import argparse
import gc
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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
    Scenario,
    Strategy,
    class_incremental,
    domain_incremental,
    results_table,
    task_free,
    task_incremental,
)
from peft_cl.assets import default_backbone
from peft_cl.hub import model_card
from peft_cl.strategies import FineTuning, NearestClassMean


SCENARIOS = ("class-incremental", "task-incremental", "task-free", "domain-incremental")


@dataclass(frozen=True)
class Entry:
    """One row of the table: the adapter, how it is trained, and the precision of the backbone."""

    config: type
    adapter: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    strategy: type[Strategy] = Strategy
    dtype: torch.dtype = torch.bfloat16
    evidence: bool = False  # measure with task evidence too
    stream: dict[str, Any] = field(default_factory=dict)  # settings where there are no tasks to grow by


class TwofoldTrainer(ContinualTrainer):
    """Measures after each task a second time, without task evidence; that record goes to a folder of its own."""

    def __init__(self, *args: Any, plain_folder: Path, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.plain_folder = plain_folder
        plain_folder.mkdir(parents=True, exist_ok=True)
        self.plain_matrix = np.full_like(self.accuracy_matrix, np.nan)

    def save(self) -> None:
        super().save()
        with self.without_evidence():
            self.evaluate()
            kept = sum(buffer.nbytes for buffer in self.model.base_model.head.active.evidence.buffers())
            replace(self.results, adapter_bytes=self.results.adapter_bytes - kept).save(self.plain_folder)

    @contextmanager
    def without_evidence(self):
        config = self.model.peft_config[self.model.active_adapter]
        weight, matrix = config.task_evidence, self.accuracy_matrix
        config.task_evidence, self.accuracy_matrix = 0.0, self.plain_matrix
        try:
            yield
        finally:
            config.task_evidence, self.accuracy_matrix = weight, matrix


LIMITS = (
    "The backbone derives from Tiny-ImageNet, and so from ImageNet, whose terms allow research use; the images have "
    "terms of their own."
)

# One head for all: rows begin at zero, rate 1e-3 (the best of 5e-4 to 5e-3 for the linear probe alone). The pools have
# the published rates: 1e-3 for CODA-Prompt, 0.03 x batch / 256 for the others. The same masked loss, batch, epochs and
# schedule for all that are trained; fine-tuning alone keeps float32 weights and takes the plain loss over the classes
# seen, which is what makes it naive.
HEAD = {"head_init": "zeros"}
LEARNING_RATE = 1e-3
# L2P in its prefix form: a 64-pixel image has 64 patches, among which the 25 tokens of the paper's form weigh heavily.
PREFIX = {
    "prompt_type": "prefix",
    "prompt_length": 4,
    "layers": [0, 1, 2, 3, 4],
    "keys_per_layer": True,
    "head_type": "cls",
}
METHODS = {
    "coda": Entry(
        CodaPromptConfig, HEAD, {"learning_rates": {"pool": 1e-3}}, evidence=True, stream={"components_per_task": 100}
    ),
    "dualprompt": Entry(
        DualPromptConfig, HEAD, {"learning_rates": {"pool": 3e-3}}, evidence=True, stream={"pool_size": 10}
    ),
    "l2p": Entry(L2PConfig, HEAD | PREFIX, {"learning_rates": {"pool": 3e-3}}, evidence=True),
    "linear-probe": Entry(LinearProbeConfig, HEAD, evidence=True),
    "nearest-class-mean": Entry(LinearProbeConfig, HEAD, strategy=NearestClassMean),
    "fine-tuning": Entry(
        LinearProbeConfig,
        HEAD | {"train_mask": False},
        {"learning_rate": 3e-4, "bf16": True},
        FineTuning,
        torch.float32,
    ),
}


def folders_of(name: str, seed: int, options: argparse.Namespace) -> list[Path]:
    """The folders that a training fills: its own, and without task evidence if it is measured with it."""
    # In the other scenarios evidence says nothing, or there are no tasks.
    twofold = METHODS[name].evidence and options.scenario == "class-incremental"
    return [options.output / f"{name}{variant}-seed{seed}" for variant in (["-evidence", ""] if twofold else [""])]


def make_scenario(data: Any, seed: int, options: argparse.Namespace) -> Scenario:
    if options.scenario == "domain-incremental":
        return domain_incremental(data, seed=seed)
    if options.scenario == "task-free":  # as often through the data as the others
        return task_free(data, options.num_tasks, seed=seed, stream_seed=seed, passes=int(options.epochs))
    kind = task_incremental if options.scenario == "task-incremental" else class_incremental
    return kind(data, options.num_tasks, seed=seed)


def run(name: str, seed: int, data: Any, options: argparse.Namespace) -> None:
    """Train one method on one class order, and measure it in all its variants."""
    entry = METHODS[name]
    set_seed(seed)
    backbone = default_backbone()
    dtype = getattr(torch, options.dtype) if entry.dtype == torch.bfloat16 else entry.dtype
    # Said, not left to be found out: mixed precision is refused on a CPU that nobody asked for.
    on_cpu = options.cpu or not torch.accelerator.is_available()
    # On a CPU the backward of sdpa is slow in bfloat16.
    attention = "eager" if on_cpu else "sdpa"
    model = AutoModelForImageClassification.from_pretrained(backbone, dtype=dtype, attn_implementation=attention)
    folders = folders_of(name, seed, options)
    scenario = make_scenario(data, seed, options)
    arguments = ContinualTrainingArguments(
        str(folders[0]),
        num_train_epochs=options.epochs if scenario.boundaries else 1,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=250,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        logging_steps=50,
        seed=seed,
        use_cpu=on_cpu,
        disable_tqdm=options.quiet,
        measure_ahead=options.scenario == "domain-incremental",
        query_cache_dir=options.cache and f"{options.cache}/queries",
        image_cache_dir=options.cache and f"{options.cache}/images",
        **{"learning_rate": LEARNING_RATE, **entry.training},
    )
    settings = entry.adapter | ({"task_evidence": options.evidence} if len(folders) > 1 else {})
    settings |= {} if scenario.boundaries else entry.stream
    kind = partial(TwofoldTrainer, plain_folder=folders[1]) if len(folders) > 1 else ContinualTrainer
    trainer = kind(
        get_peft_model(model, entry.config(**settings)),
        arguments,
        scenario,
        processing_class=AutoImageProcessor.from_pretrained(backbone),
        strategy=entry.strategy(),
    )
    trainer.train()


def write_cards(options: argparse.Namespace) -> None:
    """The model card of each trained adapter of the first seed, from its own record."""
    options.cards.mkdir(parents=True, exist_ok=True)
    for name in options.methods:
        entry, seed = METHODS[name], options.seeds[0]
        results = finished(folders_of(name, seed, options)[0])
        if entry.strategy is Strategy and results is not None:
            # The saved record names the command that anyone can repeat, not the options of one machine.
            command = (
                f"python benchmarks/sequences.py --scenario {options.scenario} --methods {name} --seeds {seed} ..."
            )
            card = model_card(replace(results, command=command), limits=[LIMITS])
            (options.cards / f"{name}-{options.output.name}.md").write_text(card)


def finished(folder: Path) -> RunResults | None:
    """The record of a run that is through, if there is one."""
    if not (folder / "results.json").is_file():
        return None
    results = RunResults.load(folder)
    return results if results.finished_tasks == len(results.task_names) else None


def check_same_settings(results: RunResults, name: str, options: argparse.Namespace) -> None:
    """Refuse a finished record that other settings made: it would stand in the table under these.

    Raises:
        SystemExit: it names the settings that differ.
    """
    entry, found = METHODS[name], results.hyperparameters
    wanted = {
        "num_train_epochs": 1 if options.scenario == "task-free" else options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": entry.training.get("learning_rate", LEARNING_RATE),
        "learning_rates": entry.training.get("learning_rates"),
        "backbone_dtype": options.dtype if entry.dtype == torch.bfloat16 else "float32",
    }
    differ = [key for key, value in wanted.items() if found.get(key) != value]
    differ += [key for key, value in entry.adapter.items() if found["adapter"].get(key) != value]
    if results.scenario["name"] != options.scenario:
        differ.append("scenario")
    if options.scenario != "domain-incremental" and len(results.task_names) != options.num_tasks:
        differ.append("num_tasks")
    if differ:
        raise SystemExit(
            f"{options.output} holds a run of {name} with other settings ({', '.join(differ)}). "
            "Move it away, or give another --output."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder or Hub name of an image data set")
    parser.add_argument("--output", type=Path, required=True, help="a folder for each method and seed goes there")
    parser.add_argument("--scenario", default="class-incremental", choices=SCENARIOS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the class order and the training")
    parser.add_argument("--num-tasks", type=int, default=10)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--evidence", type=float, default=6.0, help="weight of the task evidence")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float32"],
        help="of a frozen backbone; a trained one is float32",
    )
    parser.add_argument("--cache", help="folder for decoded images and queries, which runs may share")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is an accelerator")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--cards", type=Path, help="write the trained adapters' cards into this folder")
    parser.add_argument("--table", action="store_true", help="only print the table of the finished runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = [(name, seed, folders_of(name, seed, options)) for seed in options.seeds for name in options.methods]
    for name, _, folders in wanted:
        for results in filter(None, map(finished, folders)):
            check_same_settings(results, name, options)
    if not options.table:
        data = load_dataset(options.data)
        for name, seed, folders in wanted:
            if not all(map(finished, folders)):
                run(name, seed, data, options)
                gc.collect()
            for folder in folders:
                print(f"{folder.name}: {finished(folder).metrics}", flush=True)
    runs = [results for _, _, folders in wanted for folder in folders if (results := finished(folder)) is not None]
    print(results_table(runs))
    if options.cards:
        write_cards(options)


if __name__ == "__main__":
    main()
