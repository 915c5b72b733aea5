"""How long one image takes, and a batch: the model and the `pipeline`, over the bare backbone's.

    python benchmarks/latency.py --json benchmarks/results/cpu/latency.json
    python benchmarks/latency.py --device cuda --dtype bfloat16 --json benchmarks/results/gpu/latency.json
    python benchmarks/latency.py --best --ways model compiled onnx --json benchmarks/results/latency/cpu.json

ViT-B/16 with random weights and images. Each model takes turns with the bare one in one process; a ratio is the median
of the turns'. A method with a query pass runs the backbone twice for an image that it has not seen, so 2 is its bound;
frozen features take one pass. `compiled` is the whole model by `torch.compile`, `onnx` its file in onnxruntime, on as
many threads; both are compared with the bare model as it is, and have rows of the bare one compiled and exported.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from steps import CONFIGS, NUM_CLASSES, build_backbone, build_method, finish_work
from torch import nn
from transformers import ImageClassificationPipeline, ViTImageProcessorPil

from peft_cl import LinearProbeConfig
from peft_cl.exporting import Program


#: How a model is run.
WAYS = ("model", "pipeline", "compiled", "onnx")


def models_of(backbone: nn.Module, best: bool) -> dict[str, nn.Module]:
    """What is compared with the bare backbone, by its name in the table."""
    found = {name: build_method(name, backbone) for name in CONFIGS}
    if best:
        found |= {f"{name}, best": best_of(kind, backbone) for name, kind in CONFIGS.items()}
    return {**found, "frozen features, best": best_of(LinearProbeConfig, backbone)}


def best_of(kind: type, backbone: nn.Module) -> PeftModel:
    """The preset "best": one task of all classes; what the head's numbers are makes no difference to its time."""
    preset, depth = kind.from_preset("best"), backbone.config.num_hidden_layers
    for field in ("layers", "g_layers"):
        if hasattr(preset, field):  # fewer layers are for a trial only
            setattr(preset, field, [layer for layer in getattr(preset, field) if layer < depth] or [depth - 1])
    if preset.head_layers is not None:
        preset.head_layers = min(preset.head_layers, depth)
    model = get_peft_model(copy.deepcopy(backbone), preset)
    model.begin_task([str(row) for row in range(NUM_CLASSES)])
    return model


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


def compiled(model: nn.Module) -> nn.Module:
    """A copy, compiled whole."""
    torch._dynamo.reset()  # models share their code, and a code is compiled for a few models only
    twin = copy.deepcopy(model)
    (twin.get_base_model() if isinstance(twin, PeftModel) else twin).compile()
    return twin


def in_onnxruntime(model: nn.Module, size: int, threads: int) -> Callable[[torch.Tensor], Any]:
    """The model's ONNX file, run on so many threads. Images of noise as large as the model's are its example."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        sizes = {"pixel_values": {0: torch.export.Dim("batch", min=1)}}
        example = (torch.randn(2, 3, size, size),)
        program = torch.onnx.export(
            Program(model), example, dynamo=True, dynamic_shapes=sizes, input_names=["pixel_values"], verbose=False
        )
        program.save(file, external_data=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixel_values": pixels.numpy()})


def ways_of(
    model: nn.Module, ways: Sequence[str], size: int, threads: int
) -> dict[str, Callable[[torch.Tensor], Any]]:
    """What answers images, by its name; a pipeline, which takes a photograph, is not among them."""
    makers = {
        "model": lambda: model,
        "compiled": lambda: compiled(model),
        "onnx": lambda: in_onnxruntime(model, size, threads),
    }
    return {way: makers[way]() for way in ways if way in makers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16, help="of the batch whose throughput is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the backbone")
    parser.add_argument("--layers", type=int, default=12, help="encoder layers (fewer for a trial)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels on a side (fewer for a trial)")
    parser.add_argument("--best", action="store_true", help='the preset "best" of the three methods, too')
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:2], help="how the models are run")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bare = build_backbone(options.layers, options.image_size, getattr(torch, options.dtype), device=options.device)
    size = options.image_size
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))
    rows = []
    print("| Model | What | Milliseconds | Images a second | Over the bare backbone |\n|---|---|---:|---:|---:|")
    others = [way for way in options.ways if way in ("compiled", "onnx")]
    for name, model in {**({"bare backbone": bare} if others else {}), **models_of(bare, options.best)}.items():
        model = model.to(options.device).eval()
        ways = others if model is bare else options.ways
        for way, run in ways_of(model, ways, size, options.threads).items():
            for images in (1, options.batch_size):
                pixels = torch.randn(images, 3, size, size).to(options.device, bare.dtype)
                times = in_turns(lambda: bare(pixels), lambda run=run: run(pixels), options.turns)  # noqa: B023
                rows.append(row_of(name, f"{way}, {images} image{'s' * (images > 1)}", images, *times))
        if "pipeline" in ways:
            pipes = [pipeline_of(each, size, options.device) for each in (bare, model)]
            times = in_turns(*(lambda pipe=pipe: pipe(photograph) for pipe in pipes), options.turns)
            rows.append(row_of(name, "pipeline, 1 image", 1, *times))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        device = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {options.threads} threads"
        options.json.write_text(json.dumps({"device": device, "dtype": options.dtype, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
