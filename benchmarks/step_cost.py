"""Measure what a prompted step costs against the frozen model's own passes, on a CPU.

A prompted training step needs a query pass and a prompted pass, so the frozen model's own passes are the floor: one
forward without gradient, and one forward and backward with gradients to activations only. The ratio to that floor is
what prompting adds. The backbone is a ViT-B/16 with random weights: time does not depend on their values.

    python benchmarks/step_cost.py --json step_cost.json
    python benchmarks/step_cost.py --layers 2 --batch-size 2 --repeats 2    # a quick trial
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ViTConfig, ViTForImageClassification

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig


CONFIGS = {"l2p": L2PConfig, "dualprompt": DualPromptConfig, "coda-prompt": CodaPromptConfig}
# The papers' CIFAR-100 sequence; CODA-Prompt's preset then holds 10 x 10 components.
NUM_TASKS = 10
CLASSES_PER_TASK = 10
NUM_CLASSES = NUM_TASKS * CLASSES_PER_TASK
LEGEND = """\
seconds  median of the repetitions.
  train  forward with labels + backward to prompts, keys and head; no optimizer.
  eval   forward without gradient.
bare s   the bare model (the same frozen classifier, no adapter) in the same repetitions, median of the sum of
  train  one forward without gradient + one forward and backward with gradients to activations only,
  eval   two forwards without gradient.
         L2P's tokens lengthen the sequence of its prompted pass, not of its query pass. So for L2P the first forward
         is at the bare model's own length, and the second pass (train: forward and backward, eval: forward) at the
         length with as many more tokens. The other methods prompt attention only: both passes at the own length.
ratio    median over the repetitions of (seconds / bare seconds) in one repetition; lowest to highest in brackets.
peak     most bytes in tensors at one moment: weights, activations and gradients (bare: the larger of its passes)."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images in a step")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the frozen model"
    )
    parser.add_argument("--repeats", type=int, default=5, help="repetitions, after one that is not timed")
    parser.add_argument("--methods", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="what to measure")
    parser.add_argument("--layers", type=int, default=12, help="encoder layers (fewer for a trial)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels on a side (fewer for a trial)")
    parser.add_argument("--limit", type=float, default=math.inf, help="fail if a training step's ratio is above it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "threads", "repeats", "layers", "image_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least 1.")
    return options


def build_backbone(layers: int, image_size: int, dtype: torch.dtype) -> ViTForImageClassification:
    """The bare model: `ViTConfig()` defaults (ViT-B/16) but for depth and image size, frozen, 100 classes."""
    config = ViTConfig(num_hidden_layers=layers, image_size=image_size, num_labels=NUM_CLASSES)
    return ViTForImageClassification(config).to(dtype).requires_grad_(False).eval()


def build_method(name: str, backbone: ViTForImageClassification) -> PeftModel:
    """The method's `paper` preset on a copy of `backbone`, ten tasks begun, with the backbone's classifier as head.

    A zero head, as some presets have, would send zeros back through the layers.
    """
    preset = CONFIGS[name].from_preset("paper")
    depth = backbone.config.num_hidden_layers
    for field in ("layers", "g_layers"):
        if hasattr(preset, field):  # fewer layers are for a trial only: prompt those that exist, or else the last one
            setattr(preset, field, [layer for layer in getattr(preset, field) if layer < depth] or [depth - 1])
    model = get_peft_model(copy.deepcopy(backbone), preset)
    for task in range(NUM_TASKS):
        first = task * CLASSES_PER_TASK
        model.begin_task([f"class_{index}" for index in range(first, first + CLASSES_PER_TASK)])
    head = model.base_model.head.active
    with torch.no_grad():
        head.weight.copy_(backbone.classifier.weight)
        head.bias.copy_(backbone.classifier.bias)
    return model


@torch.no_grad()
def count_extra_tokens(model: PeftModel, backbone: nn.Module, pixel_values: torch.Tensor) -> int:
    """Tokens by which the method lengthens the sequence, read off the prompted pass of one image."""
    lengths = [
        module(pixel_values[:1], output_hidden_states=True).hidden_states[0].shape[1] for module in (model, backbone)
    ]
    return lengths[0] - lengths[1]


def backbone_tensors(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors (parameters, buffers) of all that is not the adapter's."""
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        yield from ((name, tensor) for name, tensor in tensors if model.base_model.prefix not in name)


def storage_bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each storage counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def module_bytes(module: nn.Module) -> int:
    """Bytes of the module's parameters and buffers, each storage counted once."""
    return storage_bytes(iter([*module.parameters(), *module.buffers()]))


def check_gradients(model: PeftModel) -> None:
    """Fail unless the last backward reached every trainable weight of the adapter and no weight of the backbone.

    Raises:
        AssertionError: it names the weights.
    """
    reached = [name for name, tensor in backbone_tensors(model) if tensor.grad is not None]
    if reached:
        raise AssertionError(
            f"{len(reached)} backbone weights have a gradient after the step, first {reached[:3]}: the backbone is "
            "not frozen, and the times would include its weight gradients."
        )
    missed = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    if missed:
        raise AssertionError(f"{missed} have no gradient after the step: it was not a training step of the adapter.")


def check_one_backbone(model: PeftModel, backbone: nn.Module) -> None:
    """Fail if `model` holds more weights outside its adapter than the bare model has.

    Raises:
        AssertionError: it gives both sizes.
    """
    held = storage_bytes(tensor for _, tensor in backbone_tensors(model))
    expected = module_bytes(backbone)
    if held != expected:
        raise AssertionError(
            f"The model holds {held:,} bytes outside its adapter, but one backbone has {expected:,}: both passes must "
            "share one copy."
        )


def nothing() -> None:
    """Nothing to prepare."""


@dataclass(frozen=True)
class Step:
    """Something to time.

    Attributes:
        run: the timed part.
        weights: bytes of the weights that it works with.
        prepare: what must come before, outside the time.
        check: what must hold after it; raises an AssertionError.
    """

    run: Callable[[], Any]
    weights: int
    prepare: Callable[[], Any] = nothing
    check: Callable[[], Any] = nothing

    def seconds(self) -> float:
        self.prepare()
        start = time.perf_counter()
        self.run()
        end = time.perf_counter()
        self.check()
        return end - start

    def peak_bytes(self) -> int:
        """Most bytes in tensors at one moment of the step; it runs once, untimed."""
        self.prepare()
        with TensorMemory() as memory:
            self.run()
        self.check()
        return self.weights + memory.peak


class TensorMemory(TorchDispatchMode):
    """Bytes of the tensors made inside the block and still alive: `now`, and the most there were, `peak`.

    The resident memory of the process would hold all models, and what the allocator keeps of earlier steps.
    """

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self._see((args, kwargs), made_here=False)
        result = function(*args, **kwargs)
        self._see(result, made_here=True)
        return result

    def _see(self, tree: Any, *, made_here: bool) -> None:
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.storages:
                size = storage.nbytes() if made_here else 0
                self.storages[key] = weakref.ref(storage, lambda _, key=key, size=size: self._free(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int) -> None:
        del self.storages[key]
        self.now -= size


def bare_steps(
    backbone: ViTForImageClassification, pixel_values: torch.Tensor, labels: torch.Tensor, extra_tokens: int
) -> tuple[Step, Step]:
    """The bare model's forward, and its forward and backward, with `extra_tokens` more than its own.

    The model's own forward runs. A hook appends the tokens to the embeddings, and makes these the place from which
    gradients are wanted: no weight needs one, and every layer sends its activations' gradients back.
    """
    weight = backbone.classifier.weight
    extra = torch.randn(len(pixel_values), extra_tokens, weight.shape[1]).to(weight.dtype)
    embeddings: list[torch.Tensor] = []

    def lengthen(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        output = torch.cat([output, extra], dim=1) if extra_tokens else output
        embeddings[:] = [output.requires_grad_(torch.is_grad_enabled())]
        return output

    def passes() -> torch.Tensor:
        with backbone.vit.embeddings.register_forward_hook(lengthen):
            return backbone(pixel_values).logits

    def forward() -> None:
        with torch.no_grad():
            passes()
        embeddings.clear()

    def forward_backward() -> None:
        F.cross_entropy(passes().float(), labels).backward()

    def check() -> None:
        if any(weight.grad is not None for weight in backbone.parameters()) or embeddings[0].grad is None:
            raise AssertionError("The bare backward must reach the input embeddings and no weight.")
        embeddings.clear()

    weights = module_bytes(backbone)
    return Step(forward, weights), Step(forward_backward, weights, check=check)


def method_steps(model: PeftModel, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[Step, Step]:
    """The prompted model's training step and evaluation step."""

    def prepare_training() -> None:
        model.train()
        model.zero_grad(set_to_none=True)

    def train() -> None:
        model(pixel_values=pixel_values, labels=labels).loss.backward()

    def check_training() -> None:
        check_gradients(model)
        model.zero_grad(set_to_none=True)

    def evaluate() -> None:
        with torch.no_grad():
            model(pixel_values=pixel_values)

    weights = module_bytes(model)
    return Step(train, weights, prepare_training, check_training), Step(evaluate, weights, model.eval)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all steps in turn, and return a row for each method and phase.

    One repetition runs every step once: the bare forwards, the bare forwards with backward, then each method. Whatever
    slows the machine for a while slows a method and its floor alike, and the ratio is taken within the repetition.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    backbone = build_backbone(options.layers, options.image_size, getattr(torch, options.dtype))
    pixel_values = torch.randn(options.batch_size, 3, options.image_size, options.image_size)
    labels = torch.randint(NUM_CLASSES - CLASSES_PER_TASK, NUM_CLASSES, (options.batch_size,))  # of the last task

    models = {name: build_method(name, backbone) for name in dict.fromkeys(options.methods)}
    extra = {name: count_extra_tokens(model.eval(), backbone, pixel_values) for name, model in models.items()}
    forwards, forward_backwards, prompted = {}, {}, {}
    for count in sorted({0, *extra.values()}):
        steps = bare_steps(backbone, pixel_values, labels, count)
        forwards["forward", count], forward_backwards["forward-backward", count] = steps
    for name, model in models.items():
        check_one_backbone(model, backbone)
        prompted[name, "train"], prompted[name, "eval"] = method_steps(model, pixel_values, labels)

    steps = {**forwards, **forward_backwards, **prompted}
    peaks = {key: step.peak_bytes() for key, step in steps.items()}  # also the warm-up
    seconds: dict[Any, list[float]] = {key: [] for key in steps}
    for repeat in range(options.repeats):
        for key, step in steps.items():
            seconds[key].append(step.seconds())
        print(f"repetition {repeat + 1} of {options.repeats} done", file=sys.stderr, flush=True)

    rows = []
    for name, phase in prompted:
        own, second = ("forward", 0), ("forward-backward" if phase == "train" else "forward", extra[name])
        bare = [first + last for first, last in zip(seconds[own], seconds[second], strict=True)]
        ratios = [ours / floor for ours, floor in zip(seconds[name, phase], bare, strict=True)]
        median_seconds, median_bare = statistics.median(seconds[name, phase]), statistics.median(bare)
        rows.append(
            {
                "method": CONFIGS[name].method,
                "phase": phase,
                "dtype": options.dtype,
                "cached": False,
                "seconds": median_seconds,
                "bare_seconds": median_bare,
                "ratio": statistics.median(ratios),
                "ratio_of_medians": median_seconds / median_bare,
                "ratios": ratios,
                "peak_memory_bytes": peaks[name, phase],
                "bare_peak_memory_bytes": max(peaks[own], peaks[second]),
                "extra_tokens": extra[name],
                "rows_in_use": models[name].base_model.pool.rows_in_use,
                "batch": options.batch_size,
                "threads": options.threads,
                "repeats": options.repeats,
                "layers": options.layers,
                "image_size": options.image_size,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            }
        )
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, with the legend."""
    lines = [("method", "phase", "dtype", "seconds", "bare s", "ratio", "peak MB", "bare MB")]
    for row in rows:
        lines.append(
            (
                row["method"],
                row["phase"],
                row["dtype"],
                f"{row['seconds']:.3f}",
                f"{row['bare_seconds']:.3f}",
                f"{row['ratio']:.3f} ({min(row['ratios']):.3f}-{max(row['ratios']):.3f})",
                f"{row['peak_memory_bytes'] / 1e6:.0f}",
                f"{row['bare_peak_memory_bytes'] / 1e6:.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    tokens = ", ".join(dict.fromkeys(f"{row['method']} {row['extra_tokens']}" for row in rows))
    first = rows[0]
    setting = (
        f"ViT-B/16, {first['layers']} layers, {first['image_size']} px, batch {first['batch']}, {first['threads']} "
        f"threads, {first['repeats']} repetitions, torch {first['torch']}; tokens added to the sequence: {tokens}"
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
