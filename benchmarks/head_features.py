"""Features of a task sequence under the prompts of each method, which `heads.py` puts all heads on."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from peft_cl import (
    CodaPromptConfig,
    ContinualTrainer,
    ContinualTrainingArguments,
    DualPromptConfig,
    L2PConfig,
    LinearProbeConfig,
    Scenario,
    class_incremental,
    domain_incremental,
)
from peft_cl.assets import default_backbone


@dataclass(frozen=True)
class Method:
    """A column of the table: prompts of the preset "best", how they are learnt, and the rate of the pool."""

    title: str
    config: type
    rate: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: int = 5


FIRST, EVERY = {"train_prompts": "first_task", "drift_compensation": None}, {"train_prompts": "every_task"}
METHODS = {
    "none": Method("No prompts", LinearProbeConfig),
    "l2p": Method("L2P, first task", L2PConfig, 1e-2, FIRST),
    "dualprompt": Method("DualPrompt, first task", DualPromptConfig, 6e-2, FIRST),
    "coda": Method("CODA-Prompt, first task", CodaPromptConfig, 5e-3, FIRST),
    "l2p-every": Method("L2P, every task", L2PConfig, 3e-3, EVERY, 4),
    "dualprompt-every": Method("DualPrompt, every task", DualPromptConfig, 2e-2, EVERY, 4),
    "coda-every": Method("CODA-Prompt, every task", CodaPromptConfig, 5e-3, EVERY, 4),
}


def method_of(name: str) -> Method:
    """The column of this name, `coda` or `coda@0.01`: with another rate of the pool.

    Raises:
        argparse.ArgumentTypeError: There is none.
    """
    method, _, rate = name.partition("@")
    try:
        found = METHODS[method]
        return replace(found, rate=float(rate), title=f"{found.title}, rate {rate}") if rate else found
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{name!r} is no column: give one of {', '.join(METHODS)}, with @ and a rate of the pool for another one"
        ) from None


def column(name: str) -> str:
    """The name of a column as it is on the command line, checked."""
    method_of(name)
    return name


def add_options(parser: argparse.ArgumentParser, output: bool = True) -> None:
    """What the measurements of a table have in common; those with records of their own have no `--output`."""
    parser.add_argument("--data", required=True, help="folder or Hub name of an image data set")
    if output:
        parser.add_argument("--output", type=Path, required=True, help="the records go there")
    parser.add_argument("--scenario", default="class-incremental", choices=["class-incremental", "domain-incremental"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the class order and the training")
    parser.add_argument("--num-tasks", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def make_scenario(data: Any, seed: int, options: argparse.Namespace, num_tasks: int | None = None) -> Scenario:
    if options.scenario == "domain-incremental":
        return domain_incremental(data, seed=seed)
    return class_incremental(data, num_tasks or options.num_tasks, seed=seed)


class Recording(ContinualTrainer):
    """Keeps the features of each task's images when it is learnt, and before."""

    recorded = ()
    feature_seconds = 0.0

    def look_before(self, task: Any) -> None:
        learns = self.tuner.peft_config["default"].train_prompts == "every_task" and task.index > 0
        moves = learns and any(True for _ in self.tuner.pool.parameters())
        self.before = self.features_of_all(task) if moves else None

    def observe(self, task: Any) -> None:
        super().observe(task)
        began = time.process_time()
        features = self.features_of_all(task)
        self.recorded = (*self.recorded, (self.before, features))
        self.feature_seconds += time.process_time() - began

    def test_features(self, task: Any) -> torch.Tensor:
        batches = self.plain_batches(task, "test")
        return torch.cat([self.tuner.features(batch["pixel_values"])[0].float().cpu() for batch in batches])


#: What all heads are to see; the one of the preset itself is not needed for it.
SEEN_BY_ALL = {"head": "lda", "head_options": {}, "head_features": "cls+mean", "head_layers": 6}


def learn_prompts(
    name: str,
    seed: int,
    data: Any,
    options: argparse.Namespace,
    kind: type = Recording,
    settings: Mapping[str, Any] = MappingProxyType(SEEN_BY_ALL),
) -> Any:
    """A trainer for a column of the table; `settings` replace those of the preset "best"."""
    set_seed(seed)
    method = method_of(name)
    model = AutoModelForImageClassification.from_pretrained(
        default_backbone(), dtype="float32", attn_implementation=options.attention
    )
    return kind(
        get_peft_model(model, method.config.from_preset("best", **settings, **method.settings)),
        ContinualTrainingArguments(
            str(options.work / f"{name}-seed{seed}"),
            num_train_epochs=options.epochs or method.epochs,
            per_device_train_batch_size=25,
            per_device_eval_batch_size=100,
            learning_rate=1e-3,
            learning_rates={"pool": method.rate} if method.rate else None,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            seed=seed,
            use_cpu=not torch.accelerator.is_available(),
            disable_tqdm=options.quiet,
            report_to="none",
            pictures=False,
        ),
        make_scenario(data, seed, options),
        processing_class=AutoImageProcessor.from_pretrained(default_backbone()),
    )


def features_under(name: str, seed: int, data: Any, options: argparse.Namespace) -> dict:
    """Features (N, 12 D) of each task under a method's prompts: of training images `before` its training and when it
    is learnt, of test images at the end. They are kept in `--work` while heads are measured."""
    path = options.work / f"{name}-seed{seed}.pt"
    if path.is_file():
        return torch.load(path)
    if path.parent.is_dir() and name == "none" and (others := sorted(path.parent.glob("none-seed*.pt"))):
        return reordered(torch.load(others[0]), make_scenario(data, seed, options))
    trainer = learn_prompts(name, seed, data, options)
    trainer.evaluate = lambda *words, **more: {}  # heads are measured afterwards
    prompt_seconds = 0.0  # of the processor, all threads together: another program beside this one does not count
    for task in trainer.scenario:
        trainer._begin(task)
        began = time.process_time()
        trainer.strategy.learn(trainer, task)
        prompt_seconds += time.process_time() - began
        trainer.observe(task)
    found = {
        "tasks": [
            {
                "before": before,
                "train": features,
                "test": trainer.test_features(task),
                "rows": [torch.tensor(getattr(task, split)["row"][:]) for split in ("train", "test")],
                "labels": labels_of(trainer.scenario, task),
            }
            for task, (before, features) in zip(trainer.scenario, trainer.recorded, strict=True)
        ],
        "size": trainer.model.config.hidden_size,
        "prompt_seconds": prompt_seconds,
        "feature_seconds": trainer.feature_seconds,
        "pool_bytes": sum(value.nbytes for value in trainer.tuner.pool.state_dict().values()),
        "settings": trainer.results.hyperparameters,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    return found


def reordered(found: dict, scenario: Scenario) -> dict:
    """Features of the frozen model in another order of classes or domains: they are the same numbers."""
    for place, split in enumerate(("train", "test")):
        rows = torch.cat([task["rows"][place] for task in found["tasks"]])
        features = torch.cat([task[split] for task in found["tasks"]])
        # A scenario leaves out training images that are test images too, so rows may be missing.
        found[f"{split}_features"] = features.new_zeros(int(rows.max()) + 1, features.shape[1]).index_copy_(
            0, rows, features
        )
    tasks = []
    for task in scenario:
        rows = [torch.tensor(getattr(task, split)["row"][:]) for split in ("train", "test")]
        labels = labels_of(scenario, task)
        own = {split: found[f"{split}_features"][part] for split, part in zip(("train", "test"), rows, strict=True)}
        tasks.append({"before": None, "rows": rows, "labels": labels, **own})
    return {**found, "tasks": tasks}


def labels_of(scenario: Scenario, task: Any) -> list[torch.Tensor]:
    """Of the training and of the test images."""
    return [torch.from_numpy(scenario.model_labels(task, split)) for split in ("train", "test")]
