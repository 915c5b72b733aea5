"""How long one image takes, and a batch: the model and the `pipeline`, over the bare backbone's.

    python benchmarks/latency.py --json benchmarks/results/cpu/latency.json
    python benchmarks/latency.py --device cuda --dtype bfloat16 --json benchmarks/results/gpu/latency.json

ViT-B/16 with random weights and images. Each model takes turns with the bare one in one process; a ratio is the median
of the turns'. A method with a query pass runs the backbone twice for an image that it has not seen, so 2 is its bound;
frozen features take one pass.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from steps import CONFIGS, NUM_CLASSES, build_backbone, build_method, finish_work
from transformers import ImageClassificationPipeline, ViTImageProcessorPil

from peft_cl import LinearProbeConfig


def models_of(backbone: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """What is compared with the bare backbone, by its name in the table."""
    found = {name: build_method(name, backbone) for name in CONFIGS}
    frozen = get_peft_model(copy.deepcopy(backbone), LinearProbeConfig.from_preset("best"))
    frozen.begin_task([str(row) for row in range(NUM_CLASSES)])
    return {**found, "frozen features, best": frozen}


@torch.no_grad()
def in_turns(first: Callable[[], Any], second: Callable[[], Any], turns: int) -> tuple[list[float], list[float]]:
    """Seconds of each call of `first` and of `second`, which take turns; the first turns warm up."""
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(-3, turns):
        for place in (0, 1) if turn % 2 else (1, 0):
            began = time.perf_counter()
            (first, second)[place]()
            finish_work()
            if turn >= 0:
                seconds[place].append(time.perf_counter() - began)
    return seconds


def row_of(model: str, what: str, images: int, bare: list[float], own: list[float]) -> dict[str, Any]:
    ratios = sorted(one / other for one, other in zip(own, bare, strict=True))
    found = {
        "model": model,
        "what": what,
        "images": images,
        "milliseconds": 1e3 * median(own),
        "bare_milliseconds": 1e3 * median(bare),
        "images_per_second": images / median(own),
        "ratio": median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }
    shown = f"{found['ratio']:.2f} ({found['quartiles'][0]:.2f}–{found['quartiles'][1]:.2f})"
    cells = [model, what, f"{found['milliseconds']:.1f}", f"{found['images_per_second']:,.0f}", shown]
    print(f"| {' | '.join(cells)} |", flush=True)
    return found


def pipeline_of(model: torch.nn.Module, size: int, device: str) -> ImageClassificationPipeline:
    processor = ViTImageProcessorPil(size={"height": size, "width": size})
    model = model.get_base_model() if isinstance(model, PeftModel) else model  # as the pipeline itself loads it
    return ImageClassificationPipeline(model=model, image_processor=processor, device=device, top_k=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16, help="of the batch whose throughput is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the backbone")
    parser.add_argument("--layers", type=int, default=12, help="encoder layers (fewer for a trial)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels on a side (fewer for a trial)")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bare = build_backbone(options.layers, options.image_size, getattr(torch, options.dtype), device=options.device)
    size = options.image_size
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))
    rows = []
    print("| Model | What | Milliseconds | Images a second | Over the bare backbone |\n|---|---|---:|---:|---:|")
    for name, model in models_of(bare).items():
        model = model.to(options.device).eval()
        for images in (1, options.batch_size):
            pixels = torch.randn(images, 3, size, size).to(options.device, bare.dtype)
            times = in_turns(lambda: bare(pixels), lambda model=model: model(pixels), options.turns)  # noqa: B023
            rows.append(row_of(name, f"model, {images} image{'s' * (images > 1)}", images, *times))
        pipes = [pipeline_of(each, size, options.device) for each in (bare, model)]
        times = in_turns(*(lambda pipe=pipe: pipe(photograph) for pipe in pipes), options.turns)
        rows.append(row_of(name, "pipeline, 1 image", 1, *times))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        device = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {options.threads} threads"
        options.json.write_text(json.dumps({"device": device, "dtype": options.dtype, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
