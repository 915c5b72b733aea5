"""What a computed head costs: predicting against the linear head on the same features, and a task's fit.

    python benchmarks/head_cost.py --json benchmarks/results/cpu/head_cost.json

ViT-B/16 with random weights and images, batch 16. Two models that differ in the head alone take turns in one process;
the ratio is the median of the turns' ratios, as a machine's clock wavers by more than what is looked for.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_cl import LinearProbeConfig
from peft_cl.heads import Sizes, make_head


HEADS = {
    "lda": {},
    "ridge": {},
    "ridge, projection 2000": {"projection": 2000},
    "lda, fourier 2000": {"fourier": 2000},
}
FEATURES = {"cls": {"head_features": "cls"}, "cls+mean of 6 layers": {"head_features": "cls+mean", "head_layers": 6}}


def model_with(head: str, options: dict, features: dict, classes: int, config: ViTConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(
        ViTForImageClassification(config), LinearProbeConfig(head=head, head_options=options, **features)
    )
    model.begin_task([str(row) for row in range(classes)])
    return model.eval()


@torch.no_grad()
def ratio(first: torch.nn.Module, second: torch.nn.Module, images: torch.Tensor, turns: int) -> list[float]:
    """Sorted times of `second` over those of `first`, in turns."""
    found = []
    for turn in range(turns + 1):
        seconds = []
        for model in (first, second) if turn % 2 else (second, first):
            began = time.perf_counter()
            model(images)
            seconds.append(time.perf_counter() - began)
        found.append(seconds[1] / seconds[0] if turn % 2 else seconds[0] / seconds[1])
    return sorted(found[1:])  # the first one warms up


def fit_seconds(head: str, options: dict, width: int, classes: int) -> tuple[float, float]:
    """Seconds to observe 1,000 images' features, and to fit."""
    made = make_head(head, Sizes(width, width), classes, options)
    features, labels = torch.randn(1000, width), torch.arange(1000) % classes
    began = time.perf_counter()
    for part in torch.arange(1000).split(250):
        made.observe(features[part], labels[part])
    observed = time.perf_counter()
    made.fit()
    return observed - began, time.perf_counter() - observed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--layers", type=int, default=12, help="of the backbone")
    parser.add_argument("--width", type=int, default=768, help="of the backbone")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads = options.width // 64 or 1
    config = ViTConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_attention_heads=heads,
    )
    images = torch.randn(options.batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    rows = []
    print("| Head | Features | Predicting, over the linear head | Observing 1,000 images (s) | Fitting (s) |")
    print("|---|---|---:|---:|---:|")
    published = model_with("linear", {}, FEATURES["cls"], options.classes, config)
    for name, features in FEATURES.items():
        linear = model_with("linear", {}, features, options.classes, config)
        width = linear.base_model.head.active.sizes.features
        if name != "cls":
            rows.append(row("linear", f"{name}, over cls", ratio(published, linear, images, options.turns), None))
        for label, settings in HEADS.items():
            head = label.partition(",")[0]
            times = ratio(linear, model_with(head, settings, features, options.classes, config), images, options.turns)
            rows.append(row(label, name, times, fit_seconds(head, settings, width, options.classes)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def row(head: str, features: str, times: list[float], seconds: tuple[float, float] | None) -> dict:
    found = {"head": head, "features": features, "ratio": median(times), "lowest": times[0], "highest": times[-1]}
    shown = ["", ""]
    if seconds:
        found |= {"observe_seconds": seconds[0], "fit_seconds": seconds[1]}
        shown = [f"{each:.2f}" for each in seconds]
    cells = [head, features, f"{found['ratio']:.3f} ({times[0]:.2f}–{times[-1]:.2f})", *shown]
    print(f"| {' | '.join(cells)} |", flush=True)
    return found


if __name__ == "__main__":
    main()
