"""Every head on every method: prompts are learnt once, and all heads go through the tasks on their features.

    python benchmarks/heads.py --data DATA/tiny-imagenet-cl --output benchmarks/results/heads/tiny-imagenet-cl
    python benchmarks/heads.py --scenario domain-incremental --data DATA/pacs --output benchmarks/results/heads/pacs
    python benchmarks/heads.py --table --data ... --output ...    # only print what is there

`ContinualTrainer` learns the prompts, of which the head that is computed afterwards changes nothing. Features of each
task's images are taken when it is learnt (and before, where sums are to follow their drift), those of the test images
at the end; each head then goes through the tasks on them as it would under the trainer (`tests/test_benchmarks.py`
compares the two). Trained heads take AdamW, rate 1e-3, under the mask. What has been measured is kept in `--output`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from datasets import load_dataset
from head_features import METHODS, add_options, column, features_under, make_scenario, method_of, reordered
from transformers import set_seed

from peft_cl import continual_metrics
from peft_cl.heads import Head, Sizes, drift, make_head
from peft_cl.heads.drift import IDENTITY


@dataclass(frozen=True)
class Row:
    """A head and what it sees: `cls+mean` or `cls` of the last `layers` layers."""

    head: str
    options: dict[str, Any] = field(default_factory=dict)
    parts: str = "cls+mean"
    layers: int = 6
    drift: str | None = None
    identity: float = IDENTITY  # of the map
    joint: bool = False  # learn all tasks at once
    name: str | None = None

    @property
    def title(self) -> str:
        options = "".join(f", {name} {value}" for name, value in self.options.items())
        seen = self.parts + (f" of {self.layers} layers" if self.layers > 1 else "")
        more = f", drift by {self.drift}" if self.drift else ""
        more += f" with {self.identity:g} of the identity" if self.identity != IDENTITY else ""
        more += ", all tasks at once" if self.joint else ""
        return f"{self.name or self.head + options} ({seen}{more})"


KERNEL = {"fourier": 2000, "shrinkage": 0.1}
FUSION = {"prompted": "lda", "prompted_options": {"shrinkage": 0.03}, "query": "lda", "query_options": KERNEL}
COSINE = {"metric": "cosine"}
LDA = Row("lda")
FUSED = Row("fusion", FUSION, name="fusion of lda with kernel lda of the query")
ROWS = [
    Row("linear", parts="cls", layers=1),
    Row("cosine", parts="cls", layers=1),
    Row("aligned", parts="cls", layers=1),
    Row("ncm", COSINE, "cls", 1),
    Row("lda", {}, "cls", 1),
    Row("ridge", {"projection": 2000}, "cls", 1),
    Row("ncm", COSINE),
    LDA,
    Row("ridge"),
    Row("ridge", {"projection": 2000}),
    Row("lda", KERNEL),
    replace(LDA, drift="map"),
    replace(LDA, drift="means"),
    FUSED,
    replace(FUSED, drift="map"),
    Row("linear", parts="cls", layers=1, joint=True),
]
#: What `--holdout` chooses from.
CHOICES = [
    *(Row("lda", {"shrinkage": shrinkage}) for shrinkage in (0.001, 0.01, 0.03, 0.1)),
    *(Row("lda", {**KERNEL, "shrinkage": shrinkage}) for shrinkage in (0.03, 0.1, 0.3)),
    *(Row("ridge", {"ridge": ridge}) for ridge in (0.001, 0.01, 0.1)),
    *(Row("ridge", {"projection": 2000, "ridge": ridge}) for ridge in (0.01, 0.1, 0.3)),
    *(replace(row, drift=how) for row in (LDA, FUSED) for how in (None, "means")),
    *(replace(row, drift="map", identity=value) for row in (LDA, FUSED) for value in (0.1, 1.0, 10.0)),
]
#: Heads whose result the number of tasks must not change, measured with more of them.
CLOSED = [row for row in ROWS if row.head in ("ncm", "lda", "ridge") and not row.drift]


def seen_by(row: Row, features: torch.Tensor | None, size: int) -> torch.Tensor | None:
    """Of (N, layers x 2 x D) features, last layer first, what the row's head sees."""
    if features is None:
        return None
    parts = features.unflatten(1, (-1, 2, size))[:, : row.layers]
    return (parts if "mean" in row.parts else parts[:, :, :1]).flatten(1)


# ------------------------------------------------------------------------------------------------------- heads


def through_the_tasks(row: Row, tasks: list[dict], frozen: list[dict], size: int, seed: int, epochs: int) -> dict:
    """Accuracy of a head that learns task after task, its seconds and bytes.

    The whole matrix is known where features stay; where prompts go on, accuracies are those of the end.
    """
    set_seed(seed)
    stays = all(task["before"] is None for task in tasks)
    classes = [task["labels"][0].unique().tolist() for task in tasks]
    width = seen_by(row, tasks[0]["train"][:1], size).shape[1]
    head = make_head(row.head, Sizes(width, width), 0, row.options, "zeros")
    steps = [list(range(len(tasks)))] if row.joint else [[task] for task in range(len(tasks))]
    matrix, seconds = [], 0.0
    for learnt in steps:
        began = time.process_time()
        known = 1 + max(max(rows) for rows in classes[: learnt[-1] + 1])
        head.grow(max(known, head.classes), keep=head.classes)
        new = [torch.cat([seen_by(row, of[task]["train"], size) for task in learnt]) for of in (tasks, frozen)]
        labels = torch.cat([tasks[task]["labels"][0] for task in learnt])
        if row.drift and tasks[learnt[0]]["before"] is not None:
            drift.IDENTITY = row.identity
            head.move(seen_by(row, tasks[learnt[0]]["before"], size), new[0], row.drift)
        if any(True for _ in head.parameters()):
            train(head, new[0], labels, sorted({row for task in learnt for row in classes[task]}), epochs)
        for part in torch.arange(len(labels)).split(1024):
            head.observe(new[0][part], labels[part], new[1][part])
        head.fit()
        seconds += time.process_time() - began
        seen = range(learnt[-1] + 1) if stays or learnt is steps[-1] else []
        accuracies = [
            accuracy(head, *(seen_by(row, of[task]["test"], size) for of in (tasks, frozen)), tasks[task]["labels"][1])
            for task in seen
        ]
        matrix.append([*accuracies, *[float("nan")] * (len(tasks) - len(accuracies))])
    matrix = [[float("nan")] * len(tasks)] * (len(tasks) - len(matrix)) + matrix
    return {
        "accuracy": fmean(matrix[-1]),
        "forgetting": continual_metrics(matrix)["forgetting"] if stays and not row.joint else None,
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
def accuracy(head: Head, features: torch.Tensor, query: torch.Tensor, labels: torch.Tensor) -> float:
    head.eval()
    return (head(features, query).argmax(-1) == labels).float().mean().item()


# ------------------------------------------------------------------------------------------------------- running


def run(name: str, seed: int, data: Any, options: argparse.Namespace) -> None:
    """Measure a column of the table in one order of classes or domains."""
    path = options.output / f"{name}-seed{seed}.json"
    record = json.loads(path.read_text()) if path.is_file() else {"rows": {}, "more_tasks": {}}
    wanted = [row for row in options.rows if row.title not in record["rows"] and fits(row, name)]
    more = [count for count in options.more_tasks if str(count) not in record["more_tasks"] and name == "none"]
    if not wanted and not more:
        return
    own, frozen = (features_under(each, seed, data, options) for each in (name, "none"))
    record |= {key: own[key] for key in ("prompt_seconds", "feature_seconds", "pool_bytes", "settings")}
    size, epochs = own["size"], options.epochs or method_of(name).epochs
    for row in wanted:
        tasks = [each["tasks"] for each in (own, frozen)]
        found = record["rows"][row.title] = through_the_tasks(row, *tasks, size, seed, epochs)
        print(f"{name} seed {seed} {row.title}: {100 * found['accuracy']:.2f}", flush=True)
        write(path, record)
    for count in more:
        record["more_tasks"][str(count)] = {}
        tasks = reordered(dict(own), make_scenario(data, seed, options, count))["tasks"]
        for row in CLOSED:
            found = through_the_tasks(row, tasks, tasks, size, seed, epochs)
            record["more_tasks"][str(count)][row.title] = {**found, "matrix": None}
            print(f"{name} seed {seed} {count} tasks {row.title}: {100 * found['accuracy']:.2f}", flush=True)
        write(path, record)


def fits(row: Row, name: str) -> bool:
    """Whether the row says anything of these prompts: trained heads need a pass for each epoch where features move."""
    moves = name.endswith("-every")
    if row.drift and not moves:
        return False
    if row.head == "fusion" and name == "none":
        return False
    return not (moves and (row.head in ("linear", "cosine", "aligned")))


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
        for method in dict.fromkeys([*options.methods, *METHODS])
    }
    methods = [method for method in records if records[method]]
    lines = [
        f"| Head (what it sees) | {' | '.join(method_of(method).title for method in methods)} |",
        f"|---|{'---:|' * len(methods)}",
    ]
    for row in options.rows:
        cells = [
            spread(
                [100 * each["rows"][row.title]["accuracy"] for each in records[method] if row.title in each["rows"]]
            )
            for method in methods
        ]
        if set(cells) != {NOTHING}:
            lines.append(f"| {row.title} | {' | '.join(cells)} |")
    joint = [json.loads(path.read_text())["accuracy"] for path in sorted(options.output.glob("joint-seed*.json"))]
    if joint:  # of `joint.py`
        cells = [spread([100 * value for value in joint]), *[NOTHING] * (len(methods) - 1)]
        lines.append(f"| fine-tuning of the whole backbone, all tasks at once | {' | '.join(cells)} |")
    lines += ["", "| Head (what it sees) | CPU seconds, all tasks | Head | Sums |", "|---|---:|---:|---:|"]
    for row in options.rows:
        found = [each["rows"][row.title] for each in records[methods[0]] if row.title in each["rows"]]
        if found:
            sizes = [f"{fmean(each[name] for each in found) / 1e6:.2f} MB" for name in ("head_bytes", "sums_bytes")]
            lines.append(f"| {row.title} | {fmean(each['seconds'] for each in found):.1f} | {' | '.join(sizes)} |")
    lines += [
        "",
        "| Prompts | Training (CPU s) | Features of the training images (CPU s) | Prompts |",
        "|---|---:|---:|---:|",
    ]
    for method in methods:
        prompt, passes = (
            fmean(each[name] for each in records[method]) for name in ("prompt_seconds", "feature_seconds")
        )
        size = fmean(each["pool_bytes"] for each in records[method])
        lines.append(f"| {method_of(method).title} | {prompt:.0f} | {passes:.0f} | {size / 1e3:.1f} kB |")
    counts = sorted({int(count) for each in records["none"] for count in each["more_tasks"]})
    if counts:
        first = f"{options.num_tasks} tasks"
        lines += ["", f"| Head (what it sees) | {' | '.join([first, *(f'{count} tasks' for count in counts)])} |"]
        lines.append(f"|---|{'---:|' * (len(counts) + 1)}")
        for row in CLOSED:
            cells = [[each["rows"][row.title] for each in records["none"] if row.title in each["rows"]]]
            divided = [each["more_tasks"] for each in records["none"] if each["more_tasks"]]
            cells += [[each[str(count)][row.title] for each in divided] for count in counts]
            shown = [spread([100 * each["accuracy"] for each in cell]) for cell in cells]
            lines.append(f"| {row.title} | {' | '.join(shown)} |")
    return "\n".join(lines)


#: In place of a number that was not measured.
NOTHING = "–"


def spread(values: list[float]) -> str:
    if not values:
        return NOTHING
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--work", type=Path, default=Path("out/heads"), help="features and adapters go there")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=column,
        default=list(METHODS),
        help=f"columns of the table: {', '.join(METHODS)}, or one of them with another rate of the pool (coda@0.01)",
    )
    parser.add_argument(
        "--more-tasks", nargs="*", type=int, default=[], help="numbers of tasks to divide the data into"
    )
    parser.add_argument("--epochs", type=int, help="of each task; each method has its own")
    parser.add_argument(
        "--holdout",
        type=float,
        help="choose settings: keep back this share of the training images and measure on it",
    )
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--table", action="store_true", help="only print the tables of what was measured")
    options = parser.parse_args()
    options.rows = CHOICES if options.holdout else ROWS
    options.work = options.work / options.output.name
    torch.set_num_threads(options.threads)
    if not options.table:
        data = load_dataset(options.data)
        if options.holdout:  # the test images are not looked at
            data = data["train"].train_test_split(options.holdout, seed=0)
        for split in data:  # by which features find their images again in another order
            data[split] = data[split].add_column("row", list(range(len(data[split]))))
        for seed in options.seeds:
            for method in options.methods:
                run(method, seed, data, options)
    print(tables(options))


if __name__ == "__main__":
    main()
