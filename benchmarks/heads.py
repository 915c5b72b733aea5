"""Every head on every method: prompts learnt on the first task, then frozen, and features that all heads share.

    python benchmarks/heads.py --data DATA/tiny-imagenet-cl --output benchmarks/results/heads/tiny-imagenet-cl
    python benchmarks/heads.py --scenario domain-incremental --data DATA/pacs --output benchmarks/results/heads/pacs
    python benchmarks/heads.py --table --data ... --output ...    # only print what is there

The prompts of the preset "best" are trained by `ContinualTrainer` on the first task. Then nothing moves the features
any more, so they are computed once, and each head goes through the tasks on them as it would under the trainer
(`tests/test_benchmarks.py` compares the two). Trained heads take AdamW, rate 1e-3, under the mask. What has been
measured is kept in `--output` and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
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
    Scenario,
    class_incremental,
    continual_metrics,
    domain_incremental,
)
from peft_cl.assets import default_backbone
from peft_cl.heads import Head, Sizes, make_head


#: Name -> configuration, and the rate of its prompts.
METHODS = {
    "none": (LinearProbeConfig, None),
    "l2p": (L2PConfig, 3e-3),
    "dualprompt": (DualPromptConfig, 3e-3),
    "coda": (CodaPromptConfig, 1e-3),
}
TITLES = {"none": "No prompts", "l2p": "L2P", "dualprompt": "DualPrompt", "coda": "CODA-Prompt"}


@dataclass(frozen=True)
class Row:
    """A head and what it sees: `cls+mean` or `cls` of the last `layers` layers, and the same of the frozen model."""

    head: str
    options: dict[str, Any] = field(default_factory=dict)
    parts: str = "cls+mean"
    layers: int = 6
    joint: bool = False  # learn all tasks at once

    @property
    def title(self) -> str:
        options = "".join(f", {name} {value}" for name, value in self.options.items())
        seen = self.parts + (f" of {self.layers} layers" if self.layers > 1 else "")
        return f"{self.head}{options} ({seen}{', all tasks at once' if self.joint else ''})"


ROWS = [
    Row("linear", parts="cls", layers=1),
    Row("cosine", parts="cls", layers=1),
    Row("aligned", parts="cls", layers=1),
    Row("ncm", {"metric": "cosine"}, "cls", 1),
    Row("lda", {}, "cls", 1),
    Row("ridge", {"projection": 2000}, "cls", 1),
    Row("linear"),
    Row("ncm", {"metric": "cosine"}),
    Row("lda"),
    Row("ridge"),
    Row("ridge", {"projection": 2000}),
    Row("lda", {}, "cls+mean+query", 3),
    Row("linear", parts="cls", layers=1, joint=True),
]
#: Heads whose result the number of tasks must not change, measured with more of them.
CLOSED = [row for row in ROWS if row.head in ("ncm", "lda", "ridge") and "query" not in row.parts]


# ------------------------------------------------------------------------------------------------------- features


def make_scenario(data: Any, seed: int, options: argparse.Namespace, num_tasks: int | None = None) -> Scenario:
    if options.scenario == "domain-incremental":
        return domain_incremental(data, seed=seed)
    return class_incremental(data, num_tasks or options.num_tasks, seed=seed)


def learn_prompts(method: str, seed: int, data: Any, options: argparse.Namespace) -> ContinualTrainer:
    """A trainer that has learnt the first task."""
    set_seed(seed)
    config, rate = METHODS[method]
    model = AutoModelForImageClassification.from_pretrained(
        default_backbone(), dtype="float32", attn_implementation=options.attention
    )
    layers = model.config.num_hidden_layers
    settings = {"head_features": "cls+mean", "head_layers": layers}
    trainer = ContinualTrainer(
        get_peft_model(model, config.from_preset("best", **settings)),
        ContinualTrainingArguments(
            str(options.work / f"{method}-seed{seed}"),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=25,
            per_device_eval_batch_size=100,
            learning_rate=1e-3,
            learning_rates={"pool": rate} if rate else None,
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
    trainer.train_task(trainer.scenario[0])
    return trainer


def features_of(trainer: ContinualTrainer, data: Any) -> dict[str, torch.Tensor]:
    """Features (N, F) of each split, in the data's own order."""
    found = {}
    for split in ("train", "test"):
        rows = torch.cat([rows_of(task, split) for task in trainer.scenario])
        batches = (batch for task in trainer.scenario for batch in trainer.plain_batches(task, split))
        features = torch.cat([trainer.tuner.features(batch["pixel_values"])[0].float().cpu() for batch in batches])
        found[split] = torch.empty(len(data[split]), features.shape[1]).index_copy_(0, rows, features)
    return found


def rows_of(task: Any, split: str) -> torch.Tensor:
    return torch.tensor(getattr(task, split)["row"][:])


def by_task(features: torch.Tensor, scenario: Scenario, split: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Features and labels of each task, in the order of the scenario's classes."""
    return [
        (features[rows_of(task, split)], torch.from_numpy(scenario.model_labels(task, split))) for task in scenario
    ]


def seen_by(row: Row, features: torch.Tensor, query: torch.Tensor, size: int) -> torch.Tensor:
    """Of (N, layers x 2 x D) features, last layer first, what the row's head sees."""

    def some(of: torch.Tensor) -> torch.Tensor:
        parts = of.unflatten(1, (-1, 2, size))[:, : row.layers]
        return (parts if "mean" in row.parts else parts[:, :, :1]).flatten(1)

    return torch.cat([some(features), some(query)], dim=1) if "query" in row.parts else some(features)


# ------------------------------------------------------------------------------------------------------- heads


def through_the_tasks(row: Row, tasks: dict[str, list], seed: int, epochs: int) -> dict:
    """Accuracy matrix of a head that learns task after task, its seconds and bytes."""
    set_seed(seed)
    width = tasks["train"][0][0].shape[1]
    classes = [labels.unique().tolist() for _, labels in tasks["train"]]
    count = 1 + max(max(rows) for rows in classes)
    head = make_head(row.head, Sizes(width, width), 0, row.options, "zeros")
    steps = [list(range(len(classes)))] if row.joint else [[task] for task in range(len(classes))]
    matrix, began, evaluation = [], time.perf_counter(), 0.0
    for learnt in steps:
        known = count if row.joint else 1 + max(max(rows) for rows in classes[: learnt[0] + 1])
        head.grow(known, keep=head.classes)
        features, labels = (torch.cat([tasks["train"][task][part] for task in learnt]) for part in (0, 1))
        if any(True for _ in head.parameters()):
            train(head, features, labels, sorted({row for task in learnt for row in classes[task]}), epochs)
        for part in torch.arange(len(labels)).split(1024):
            head.observe(features[part], labels[part])
        head.fit()
        start = time.perf_counter()
        row_of_matrix = [accuracy(head, *test) for test in tasks["test"][: learnt[-1] + 1]]
        matrix.append(row_of_matrix + [float("nan")] * (len(classes) - len(row_of_matrix)))
        evaluation += time.perf_counter() - start
    seconds = time.perf_counter() - began - evaluation
    if row.joint:
        matrix = [[float("nan")] * len(classes)] * (len(classes) - 1) + matrix
    return {
        "accuracy": fmean(matrix[-1]),
        "forgetting": None if row.joint else continual_metrics(matrix)["forgetting"],
        "matrix": [[None if value != value else value for value in line] for line in matrix],
        "seconds": seconds,
        "head_bytes": sum(value.nbytes for value in head.state_dict().values()),
        "sums_bytes": sum(value.nbytes for value in head.going_on().values()),
    }


def train(head: Head, features: torch.Tensor, labels: torch.Tensor, allowed: list[int], epochs: int) -> None:
    """As the trainer does: cross-entropy over the task's classes, AdamW without decay, batches of 25."""
    head.train()
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=0.0)
    masked = torch.ones(head.classes, dtype=torch.bool)
    masked[allowed] = False
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(25):
            loss = F.cross_entropy(head(features[batch]).masked_fill(masked, -torch.inf), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
    head.eval()


@torch.no_grad()
def accuracy(head: Head, features: torch.Tensor, labels: torch.Tensor) -> float:
    head.eval()
    return (head(features).argmax(-1) == labels).float().mean().item()


def held_back(tasks: dict[str, list], share: float) -> dict[str, list]:
    """The training images, of which a share takes the place of the test images: settings are chosen so."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list] = {"train": [], "test": []}
    for features, labels in tasks["train"]:
        order = torch.randperm(len(labels), generator=generator)
        first = int(share * len(labels))
        found["test"].append((features[order[:first]], labels[order[:first]]))
        found["train"].append((features[order[first:]], labels[order[first:]]))
    return found


# ------------------------------------------------------------------------------------------------------- running


def run(method: str, seed: int, data: Any, options: argparse.Namespace) -> None:
    """Measure a method's row of the table in one class order."""
    path = options.output / f"{method}-seed{seed}.json"
    record = json.loads(path.read_text()) if path.is_file() else {"rows": {}, "more_tasks": {}}
    wanted = [row for row in options.rows if row.title not in record["rows"]]
    wanted = [row for row in wanted if method != "none" or "query" not in row.parts]
    more = [count for count in options.more_tasks if str(count) not in record["more_tasks"] and method == "none"]
    if not wanted and not more:
        return
    scenario = make_scenario(data, seed, options)
    own, frozen = (cached_features(name, seed, data, options) for name in (method, "none"))
    record |= {name: own[name] for name in ("prompt_seconds", "feature_seconds", "pool_bytes", "settings")}
    for row in wanted:
        seen = {split: seen_by(row, own[split], frozen[split], own["size"]) for split in ("train", "test")}
        tasks = {split: by_task(features, scenario, split) for split, features in seen.items()}
        tasks = held_back(tasks, options.holdout) if options.holdout else tasks
        found = record["rows"][row.title] = through_the_tasks(row, tasks, seed, options.epochs)
        print(f"{method} seed {seed} {row.title}: {100 * found['accuracy']:.2f}", flush=True)
        write(path, record)
    for count in more:
        record["more_tasks"][str(count)] = {}
        divided = make_scenario(data, seed, options, count)
        for row in CLOSED:
            seen = {split: seen_by(row, own[split], own[split], own["size"]) for split in ("train", "test")}
            tasks = {split: by_task(features, divided, split) for split, features in seen.items()}
            found = through_the_tasks(row, tasks, seed, options.epochs)
            record["more_tasks"][str(count)][row.title] = {**found, "matrix": None}
            print(f"{method} seed {seed} {count} tasks {row.title}: {100 * found['accuracy']:.2f}", flush=True)
        write(path, record)


def cached_features(method: str, seed: int, data: Any, options: argparse.Namespace) -> dict:
    """Features under a method's prompts, kept in `--work` meanwhile; without prompts no seed tells."""
    path = options.work / (f"{method}-seed{seed}.pt" if method != "none" else "none.pt")
    if path.is_file():
        return torch.load(path)
    trainer = learn_prompts(method, seed, data, options)
    began = time.perf_counter()
    found = features_of(trainer, data)
    share = len(data["train"]) / (len(data["train"]) + len(data["test"]))
    found |= {
        "size": trainer.model.config.hidden_size,
        "prompt_seconds": trainer.train_seconds if METHODS[method][1] else 0.0,
        "feature_seconds": (time.perf_counter() - began) * share,
        "pool_bytes": sum(value.nbytes for value in trainer.tuner.pool.state_dict().values()),
        "settings": trainer.results.hyperparameters,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    return found


def write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------- tables


def tables(options: argparse.Namespace) -> str:
    """Accuracy of every head on every method; what it costs; and more tasks."""
    records = {
        method: [
            json.loads(path.read_text())
            for seed in options.seeds
            if (path := options.output / f"{method}-seed{seed}.json").is_file()
        ]
        for method in METHODS
    }
    methods = [method for method in METHODS if records[method]]
    lines = [
        f"| Head (what it sees) | {' | '.join(TITLES[method] for method in methods)} |",
        f"|---|{'---:|' * len(methods)}",
    ]
    for row in ROWS:
        cells = [
            spread(
                [100 * each["rows"][row.title]["accuracy"] for each in records[method] if row.title in each["rows"]]
            )
            for method in methods
        ]
        lines.append(f"| {row.title} | {' | '.join(cells)} |")
    lines += ["", "| Head (what it sees) | Seconds, all tasks | Head | Sums |", "|---|---:|---:|---:|"]
    for row in ROWS:
        found = [each["rows"][row.title] for each in records[methods[0]] if row.title in each["rows"]]
        if found:
            sizes = [f"{fmean(each[name] for each in found) / 1e6:.2f} MB" for name in ("head_bytes", "sums_bytes")]
            lines.append(f"| {row.title} | {fmean(each['seconds'] for each in found):.1f} | {' | '.join(sizes)} |")
    lines += [
        "",
        "| Prompts | Training (s) | One pass over the training images (s) | Prompts |",
        "|---|---:|---:|---:|",
    ]
    for method in methods:
        prompt, passes = (
            fmean(each[name] for each in records[method]) for name in ("prompt_seconds", "feature_seconds")
        )
        size = fmean(each["pool_bytes"] for each in records[method])
        lines.append(f"| {TITLES[method]} | {prompt:.0f} | {passes:.0f} | {size / 1e3:.1f} kB |")
    counts = sorted({int(count) for each in records["none"] for count in each["more_tasks"]})
    if counts:
        first = f"{options.num_tasks} tasks"
        lines += ["", f"| Head (what it sees) | {' | '.join([first, *(f'{count} tasks' for count in counts)])} |"]
        lines.append(f"|---|{'---:|' * (len(counts) + 1)}")
        for row in CLOSED:
            cells = [[each["rows"][row.title] for each in records["none"] if row.title in each["rows"]]]
            cells += [[each["more_tasks"][str(count)][row.title] for each in records["none"]] for count in counts]
            shown = [spread([100 * each["accuracy"] for each in cell]) for cell in cells]
            lines.append(f"| {row.title} | {' | '.join(shown)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder or Hub name of an image data set")
    parser.add_argument("--output", type=Path, required=True, help="the records go there")
    parser.add_argument("--work", type=Path, default=Path("out/heads"), help="features and adapters go there")
    parser.add_argument("--scenario", default="class-incremental", choices=["class-incremental", "domain-incremental"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the class order and the training")
    parser.add_argument("--num-tasks", type=int, default=10)
    parser.add_argument(
        "--more-tasks", nargs="*", type=int, default=[], help="numbers of tasks to divide the data into"
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument(
        "--holdout", type=float, help="measure on this share of the training images, to choose settings"
    )
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--table", action="store_true", help="only print the tables of what was measured")
    options = parser.parse_args()
    options.rows, options.work = ROWS, options.work / options.output.name
    torch.set_num_threads(options.threads)
    if not options.table:
        data = load_dataset(options.data)
        for split in data:  # by which features find their images again in another order
            data[split] = data[split].add_column("row", list(range(len(data[split]))))
        for seed in options.seeds:
            for method in options.methods:
                run(method, seed, data, options)
    print(tables(options))


if __name__ == "__main__":
    main()
