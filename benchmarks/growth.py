"""What a pool costs as tasks come: the start of a task, a step, memory; from 10 tasks to 1,000.

    python benchmarks/growth.py --tasks 10 100 1000

The pools are those of a ViT-B/16 (hidden size 768), a row or component a task, with random queries in place of images:
a step is the pool's own part, forward and backward, which a training step has beside the frozen model's passes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig
from peft_cl.tuners.base.pool import Geometry, PromptPool
from peft_cl.tuners.coda.pool import CodaPromptPool
from peft_cl.tuners.dualprompt.pool import DualPromptPool
from peft_cl.tuners.l2p.pool import L2PPool


#: Method -> its pool after a number of tasks. L2P's pool does not grow; it is as large as the others' here.
POOLS: dict[str, Callable[[int, int], PromptPool]] = {
    "l2p": lambda tasks, rows: L2PPool(L2PConfig(pool_size=tasks * rows), Geometry(768, 12)),
    "dualprompt": lambda tasks, rows: DualPromptPool(DualPromptConfig(pool_size=None), Geometry(768, 12)),
    "coda": lambda tasks, rows: CodaPromptPool(CodaPromptConfig(components_per_task=rows), Geometry(768, 12)),
    "coda-orthogonal": lambda tasks, rows: CodaPromptPool(
        CodaPromptConfig(components_per_task=rows, orthogonality_coefficient=0.1), Geometry(768, 12)
    ),
}


def seconds(function: Callable[[], None], repeats: int) -> float:
    """Median time of a call, after one that is not timed."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def measure(name: str, tasks: int, options: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    pool = POOLS[name](tasks, options.rows_per_task).train()
    starts = []
    for task in range(1, tasks):
        pool.config.tasks = [[0]] * (task + 1)
        began = time.perf_counter()
        pool.begin_task(task)
        starts.append(time.perf_counter() - began)
    query = torch.randn(options.batch_size, 768)

    def train() -> None:
        prompts = pool(query)
        kept = [part for entry in prompts.layers.values() for part in (entry.keys, entry.values, entry.tokens)]
        total = sum(part.square().sum() for part in kept if part is not None) + sum(prompts.losses.values())
        pool.zero_grad()
        total.backward()

    def evaluate() -> None:
        with torch.no_grad():
            pool(query)

    step = seconds(train, options.repeats)
    pool.eval()
    return {
        "method": name,
        "tasks": tasks,
        "rows": pool.rows_in_use,
        "last_start_s": median(starts[-5:]) if starts else 0.0,
        "slowest_start_s": max(starts, default=0.0),
        "train_ms": 1000 * step,
        "eval_ms": 1000 * seconds(evaluate, options.repeats),
        "state_mb": sum(tensor.nbytes for tensor in pool.state_dict().values()) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument(
        "--rows-per-task", type=int, default=1, help="CODA-Prompt's components (and L2P's rows) a task"
    )
    parser.add_argument("--methods", nargs="+", default=list(POOLS), choices=POOLS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(name, tasks, options) for name in options.methods for tasks in options.tasks]
    print("| Method | Tasks | Rows | Last start (s) | Slowest start (s) | Train (ms) | Eval (ms) | State (MB) |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['method']} | {row['tasks']} | {row['rows']} | {row['last_start_s']:.3f} | "
            f"{row['slowest_start_s']:.3f} | {row['train_ms']:.1f} | {row['eval_ms']:.1f} | {row['state_mb']:.1f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
