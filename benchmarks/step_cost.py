"""Measure what a prompted step costs against the frozen model's own passes.

A prompted training step needs a query pass and a prompted pass, so the frozen model's own passes are the floor: one
forward without gradient, and one forward and backward with gradients to activations only. The ratio to that floor is
what prompting adds. The backbone is a ViT-B/16, or what `--family` names, with random weights: time does not depend on
their values.

    python benchmarks/step_cost.py --json step_cost.json
    python benchmarks/step_cost.py --layers 2 --batch-size 2 --repeats 2    # a quick trial
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from peft import PeftModel
from steps import (
    CLASSES_PER_TASK,
    CONFIGS,
    NUM_CLASSES,
    NUM_TASKS,
    SHAPES,
    Step,
    bare_steps,
    build_backbone,
    build_method,
    check_one_backbone,
    compile_layers,
    count_extra_tokens,
    encoder_of,
    matrix_products,
    method_steps,
    reference_steps,
)
from transformers import PreTrainedModel


DTYPES = ("float32", "bfloat16", "float16")
LEGEND = """\
seconds  median of the repetitions.
  train  forward with labels + backward to prompts, keys and head; no optimizer.
  eval   forward without gradient.
cached   whether the queries come from a cache (peft_cl keeps them where images are not augmented).
bare s   the bare model (the same frozen classifier, no adapter) in the same repetitions, median of the sum of
  train  one forward without gradient + one forward and backward with gradients to activations only,
  eval   two forwards without gradient;
         with cached queries without the first of the two.
         L2P's tokens lengthen the sequence of its prompted pass, not of its query pass. So for L2P the first forward
         is at the bare model's own length, and the second pass (train: forward and backward, eval: forward) at the
         length with as many more tokens. The other methods prompt attention only: both passes at the own length.
ratio    median over the repetitions of (seconds / bare seconds) in one repetition; lowest to highest in brackets.
speed-up of throughput over the reference's float32 step: the plain HF model in the shape of the public CODA-Prompt
         code, two whole passes and a backward with gradients to all weights (eval: two forwards).
products matrix products a second, as a share of the most (10^12 operations a second), which products of these shapes
         and nothing else reach in the same run.
peak     most bytes in tensors at one moment: weights, activations and gradients (bare: the larger of its passes)."""


class Key(NamedTuple):
    """What is timed: a method (or `"bare"`, `"reference"`), a step or pass, a dtype, and how."""

    what: str
    phase: str
    dtype: str = "float32"
    cached: bool = False
    extra_tokens: int = 0
    beside: str = ""  # of a bare pass: the method whose steps it is timed with


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images in a step")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--device", default="cpu", help="where to measure, for instance cuda")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="of the frozen model"
    )
    parser.add_argument("--attention", default="sdpa", help="attention implementation of transformers")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the layers of the methods and of the bare model",
    )
    parser.add_argument(
        "--channels-last", action="store_true", help="images and patch embedding in this format of memory"
    )
    parser.add_argument("--repeats", type=int, default=5, help="repetitions, after one that is not timed")
    parser.add_argument(
        "--methods", nargs="+", choices=CONFIGS, default=None, help="what to measure; default: all that go into it"
    )
    parser.add_argument("--family", choices=SHAPES, default="ViT-B/16", help="shape of the backbone")
    parser.add_argument("--tasks", type=int, default=NUM_TASKS, help="tasks begun, at least 10")
    parser.add_argument("--layers", type=int, default=12, help="encoder layers (fewer for a trial)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels on a side (fewer for a trial)")
    parser.add_argument("--limit", type=float, default=math.inf, help="fail if a training step's ratio is above it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "threads", "repeats", "layers", "image_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least 1.")
    if options.methods is None:  # the papers' L2P has tokens, which do not enter Swin
        options.methods = [name for name in CONFIGS if name != "l2p" or options.family != "Swin-T"]
    if options.tasks < NUM_TASKS:
        parser.error(f"--tasks is {options.tasks}, but must be at least {NUM_TASKS}, which divide the 100 classes.")
    return options


def make_steps(
    options: argparse.Namespace,
) -> tuple[dict[Key, Step], dict[Key, dict[str, Any]], list[tuple[PreTrainedModel, list[PeftModel]]]]:
    """All steps in the order in which they are timed, facts of those that become rows, and each bare model with the
    methods on copies of it."""
    order = torch.channels_last if options.channels_last else torch.contiguous_format
    pixel_values = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=options.device)
    pixel_values = pixel_values.to(memory_format=order)
    first = NUM_CLASSES - CLASSES_PER_TASK  # of the last task
    labels = torch.randint(first, NUM_CLASSES, (options.batch_size,), device=options.device)
    steps: dict[Key, Step] = {}
    facts: dict[Key, dict[str, Any]] = {}
    built: list[tuple[PreTrainedModel, list[PeftModel]]] = []

    def backbone_in(dtype: str) -> PreTrainedModel:
        settings = options.attention, options.device, options.family
        backbone = build_backbone(options.layers, options.image_size, getattr(torch, dtype), *settings)
        return backbone.to(memory_format=order)

    names = Key("reference", "train"), Key("reference", "eval")
    steps.update(zip(names, reference_steps(backbone_in("float32"), pixel_values, labels), strict=True))
    for dtype in dict.fromkeys(options.dtype):
        backbone = backbone_in(dtype)
        with torch.no_grad():
            tokens = encoder_of(backbone)(pixel_values[:1].to(backbone.dtype)).last_hidden_state.shape[1]
        tokens *= options.batch_size
        steps[Key("products", "forward", dtype)] = matrix_products(backbone.dtype, tokens, options.device)
        models = {name: build_method(name, backbone, options.tasks) for name in dict.fromkeys(options.methods)}
        extra = {name: count_extra_tokens(model.eval(), backbone, pixel_values) for name, model in models.items()}
        for name, model in models.items():
            check_one_backbone(model, backbone)
            steps.update(neighbours(Key(name, "", dtype, False, extra[name]), model, backbone, pixel_values, labels))
            for cached in (False, True):
                for phase in ("train", "eval"):
                    key = Key(name, phase, dtype, cached, extra[name])
                    facts[key] = {"rows_in_use": model.base_model.pool.rows_in_use}
        built.append((backbone, list(models.values())))
    return steps, facts, built


def neighbours(
    key: Key, model: PeftModel, backbone: PreTrainedModel, pixel_values: torch.Tensor, labels: torch.Tensor
) -> dict[Key, Step]:
    """A method's steps, each beside the bare passes that it is measured by; `key` says what they have in common."""
    with torch.no_grad():
        query = model.base_model.query(pixel_values)
    bare = {count: bare_steps(backbone, pixel_values, labels, count) for count in {0, key.extra_tokens}}
    own = {cached: method_steps(model, pixel_values, labels, query if cached else None) for cached in (False, True)}
    floor = Key("bare", "forward", key.dtype, beside=key.what)
    steps = {floor._replace(extra_tokens=count): forward for count, (forward, _) in bare.items()}
    steps.update({key._replace(phase="eval", cached=cached): evaluate for cached, (_, evaluate) in own.items()})
    longer = floor._replace(phase="forward-backward", extra_tokens=key.extra_tokens)
    steps[longer] = bare[key.extra_tokens][1]
    steps.update({key._replace(phase="train", cached=cached): train for cached, (train, _) in own.items()})
    return steps


def floor_of(key: Key) -> Iterator[Key]:
    """The bare passes that the step is measured by."""
    forward = Key("bare", "forward", key.dtype, beside=key.what)
    if not key.cached:
        yield forward
    second = "forward-backward" if key.phase == "train" else "forward"
    yield forward._replace(phase=second, extra_tokens=key.extra_tokens)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all steps in turn, and return a row for each method, phase, dtype, with and without cached queries.

    One repetition runs every step once, a method's steps in turn with the bare passes that they are measured by. What
    slows the machine for a while slows a method and its floor alike, and the ratio is taken within the repetition.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    steps, facts, built = make_steps(options)
    peaks = {key: step.peak_bytes() for key, step in steps.items()}  # also the warm-up
    products = {key: step.products() for key, step in steps.items()}
    if options.compile:  # nothing can be compiled while bytes and products are counted
        for backbone, models in built:
            compile_layers(backbone, models, backend=options.compile)
        for step in steps.values():
            step.seconds()
    seconds: dict[Key, list[float]] = {key: [] for key in steps}
    for repeat in range(options.repeats):
        for key, step in steps.items():
            seconds[key].append(step.seconds())
        print(f"repetition {repeat + 1} of {options.repeats} done", file=sys.stderr, flush=True)
    setting = {
        "tasks": options.tasks,
        "batch": options.batch_size,
        "device": torch.cuda.get_device_name(options.device) if "cuda" in options.device else options.device,
        "attention": options.attention,
        "compiled": options.compile,
        "channels_last": options.channels_last,
        "threads": options.threads,
        "repeats": options.repeats,
        "family": options.family,
        "layers": options.layers,
        "image_size": options.image_size,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    return [{**row_of(key, seconds, peaks, products, options.batch_size), **facts[key], **setting} for key in facts]


def row_of(
    key: Key,
    seconds: dict[Key, list[float]],
    peaks: dict[Key, int],
    products: dict[Key, int],
    batch_size: int,
) -> dict[str, Any]:
    """What was measured of one method's step."""
    floor = list(floor_of(key))
    bare = [sum(passes) for passes in zip(*(seconds[each] for each in floor), strict=True)]
    ratios = [ours / theirs for ours, theirs in zip(seconds[key], bare, strict=True)]
    reference = seconds[Key("reference", key.phase)]
    bare_peak = max(peaks[each] for each in floor)
    alone = Key("products", "forward", key.dtype)
    most = products[alone] / statistics.median(seconds[alone])
    return {
        "method": CONFIGS[key.what].method,
        "phase": key.phase,
        "dtype": key.dtype,
        "cached": key.cached,
        "seconds": statistics.median(seconds[key]),
        "bare_seconds": statistics.median(bare),
        "reference_seconds": statistics.median(reference),
        "ratio": statistics.median(ratios),
        "ratio_of_medians": statistics.median(seconds[key]) / statistics.median(bare),
        "ratios": ratios,
        "speedup": statistics.median(b / a for a, b in zip(seconds[key], reference, strict=True)),
        "images_per_second": batch_size / statistics.median(seconds[key]),
        "products": products[key],
        "products_per_second": products[key] / statistics.median(seconds[key]),
        "most_products_per_second": most,
        "share_of_most": products[key] / statistics.median(seconds[key]) / most,
        "peak_memory_bytes": peaks[key],
        "bare_peak_memory_bytes": bare_peak,
        "memory_ratio": peaks[key] / bare_peak,
        "extra_tokens": key.extra_tokens,
    }


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, with the legend."""
    lines = [
        (
            "method",
            "phase",
            "dtype",
            "cached",
            "seconds",
            "images/s",
            "bare s",
            "ratio",
            "speed-up",
            "products",
            "peak MB",
            "bare",
        )
    ]
    for row in rows:
        lines.append(
            (
                row["method"],
                row["phase"],
                row["dtype"],
                "yes" if row["cached"] else "no",
                f"{row['seconds']:.3f}",
                f"{row['images_per_second']:.1f}",
                f"{row['bare_seconds']:.3f}",
                f"{row['ratio']:.3f} ({min(row['ratios']):.3f}-{max(row['ratios']):.3f})",
                f"{row['speedup']:.2f}",
                f"{row['share_of_most']:.0%} of {row['most_products_per_second'] / 1e12:.2f}",
                f"{row['peak_memory_bytes'] / 1e6:.0f}",
                f"{row['bare_peak_memory_bytes'] / 1e6:.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    tokens = ", ".join(dict.fromkeys(f"{row['method']} {row['extra_tokens']}" for row in rows))
    first = rows[0]
    compiled = f", layers compiled by {first['compiled']}" if first["compiled"] else ""
    setting = (
        f"{first['family']}, {first['layers']} layers, {first['image_size']} px, batch {first['batch']}, "
        f"{first['tasks']} tasks, {first['attention']} attention{compiled}, {first['device']}, "
        f"{first['threads']} threads, {first['repeats']} repetitions, torch {first['torch']}; "
        f"tokens added to the sequence: {tokens}"
    )
    return f"{setting}\n\n{table}\n\n{LEGEND}"


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table, write the rows if asked to, and return them.

    Raises:
        SystemExit: a training step costs more than `--limit` times the bare model's passes.
    """
    options = parse_arguments(arguments)
    rows, limit = measure(options), options.limit
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(format_table(rows))
    over = [f"{row['method']} {row['ratio']:.3f}" for row in rows if row["phase"] == "train" and row["ratio"] > limit]
    if over:
        raise SystemExit(f"Training steps above {limit:g} times the bare model's passes: {', '.join(over)}.")
    return rows


if __name__ == "__main__":
    main()
