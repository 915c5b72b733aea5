"""Finding keys in large pools: all compared, or a graph of FAISS searched; time, recall, and from which size it pays.

    python benchmarks/search.py --json benchmarks/results/search/cpu.json
    python benchmarks/search.py --sizes 100 1000 --queries 20 --repeats 1      # a trial

Keys and queries lie around the same 100 centres, as images of 100 classes do. A batch is searched at a time, as in
evaluation; the time is the median over the repeats, the recall the share of the exact top k that is found.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from peft_cl.tuners.base.search import KeyIndex
from peft_cl.tuners.base.similarity import cosine


CENTRES = 100


def measure(size: int, options: argparse.Namespace) -> dict[str, Any]:
    """A row for a pool of `size` keys."""
    generator = torch.Generator().manual_seed(options.seed)
    centres = torch.randn(CENTRES, options.width, generator=generator)

    def around(count: int) -> torch.Tensor:
        which = torch.randint(CENTRES, (count,), generator=generator)
        return centres[which] + options.spread * torch.randn(count, options.width, generator=generator)

    keys, query = around(size)[None], around(options.queries)
    index = KeyIndex()
    began = time.perf_counter()
    found = index.nearest(query, keys, options.top_k, "cosine", stamp=0)
    built = time.perf_counter() - began
    exact = cosine(query, keys).topk(options.top_k).indices
    compared = _timed(lambda: cosine(query, keys).topk(options.top_k), options.repeats)
    searched = _timed(lambda: index.nearest(query, keys, options.top_k, "cosine", stamp=0), options.repeats)
    return {
        "keys": size,
        "exact_ms": 1000 * compared,
        "faiss_ms": 1000 * searched,
        "build_seconds": built,
        "recall": (found[..., None] == exact[..., None, :]).any(-1).float().mean().item(),
        "pays": searched < compared,
        "threads": torch.get_num_threads(),
        **{name: getattr(options, name) for name in ("width", "queries", "top_k", "spread", "seed")},
    }


def _timed(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    sizes = [100, 1000, 3000, 10_000, 30_000, 100_000]
    parser.add_argument("--sizes", nargs="+", type=int, default=sizes)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=128, help="images in a batch")
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--spread", type=float, default=0.5, help="of an image around its class's centre, of 1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import faiss

    faiss.omp_set_num_threads(options.threads)
    rows = []
    print("| Keys | All compared (ms) | Graph (ms) | Building it (s) | Recall (%) | It pays |")
    print("|---:|---:|---:|---:|---:|---|")
    for size in options.sizes:
        row = measure(size, options)
        rows.append(row)
        print(
            f"| {size:,} | {row['exact_ms']:.2f} | {row['faiss_ms']:.2f} | {row['build_seconds']:.1f} | "
            f"{100 * row['recall']:.1f} | {'yes' if row['pays'] else 'no'} |",
            flush=True,
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
