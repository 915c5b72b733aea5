"""The steps that `step_cost.py` times: the bare model's passes, the reference's, and the prompted model's."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig
from peft_cl.backbones import family_of


CONFIGS = {"l2p": L2PConfig, "dualprompt": DualPromptConfig, "coda-prompt": CodaPromptConfig}
# The papers' CIFAR-100 sequence; CODA-Prompt's preset then holds 10 x 10 components.
NUM_TASKS = 10
CLASSES_PER_TASK = 10
NUM_CLASSES = NUM_TASKS * CLASSES_PER_TASK
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


def _vit(layers: int, **options: Any) -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(num_hidden_layers=layers, **options))


def _dinov2(layers: int, **options: Any) -> PreTrainedModel:
    return Dinov2ForImageClassification(Dinov2Config(num_hidden_layers=layers, patch_size=14, **options))


def _clip(layers: int, *, image_size: int, **options: Any) -> PreTrainedModel:
    tower = {**BASE, "num_hidden_layers": layers, "image_size": image_size, "patch_size": 16}
    return CLIPForImageClassification(CLIPConfig(vision_config=tower, **options))


def _swin(layers: int, **options: Any) -> PreTrainedModel:
    """All of its stages have the published depth from 12 layers on, and fewer only for a trial."""
    return SwinForImageClassification(SwinConfig(depths=[2, 2, 6, 2] if layers >= 12 else [1, 1, 1, 1], **options))


#: What `--family` names: the shapes of published checkpoints.
SHAPES = {"ViT-B/16": _vit, "DINOv2-B/14": _dinov2, "CLIP-B/16": _clip, "Swin-T": _swin}


def build_backbone(
    layers: int,
    image_size: int,
    dtype: torch.dtype,
    attention: str = "sdpa",
    device: str = "cpu",
    shape: str = "ViT-B/16",
) -> PreTrainedModel:
    """The bare model: a published shape but for depth and image size, with random weights, frozen, 100 classes."""
    model = SHAPES[shape](layers, image_size=image_size, num_labels=NUM_CLASSES, attn_implementation=attention)
    return model.to(device, dtype).requires_grad_(False).eval()


def encoder_of(backbone: PreTrainedModel) -> nn.Module:
    return getattr(backbone, family_of(backbone).encoder)


def build_method(name: str, backbone: PreTrainedModel, tasks: int = NUM_TASKS) -> PeftModel:
    """The method's `paper` preset on a copy of `backbone`, `tasks` begun, with the backbone's classifier as head.

    Ten tasks divide the 100 classes; further ones bring the last ten classes again, as new domains do.

    A zero head, as some presets have, would send zeros back through the layers.
    """
    preset = CONFIGS[name].from_preset("paper")
    depth = len(family_of(backbone).layer_list(encoder_of(backbone)))
    for field in ("layers", "g_layers"):
        if hasattr(preset, field):  # fewer layers are for a trial only: prompt those that exist, or else the last one
            setattr(preset, field, [layer for layer in getattr(preset, field) if layer < depth] or [depth - 1])
    if name == "dualprompt":
        preset.pool_size = None  # a row for each task
    model = get_peft_model(copy.deepcopy(backbone), preset)
    for task in range(tasks):
        first = min(task, NUM_TASKS - 1) * CLASSES_PER_TASK
        model.begin_task([f"class_{index}" for index in range(first, first + CLASSES_PER_TASK)])
    head = model.base_model.head.active
    with torch.no_grad():
        head.weight.copy_(backbone.classifier.weight[:, : head.weight.shape[1]])  # L2P's reads less than DINOv2's own
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


def compile_layers(backbone: PreTrainedModel, models: Iterable[PeftModel], **options: Any) -> None:
    """Compile the layers of the bare model and of the methods' copies of it."""
    for layer in family_of(backbone).layer_list(encoder_of(backbone)):
        layer.compile(**options)
    for model in models:
        model.base_model.encoder.compile_layers(**options)


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


def finish_work() -> None:
    """Wait for what a GPU has still to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
        finish_work()
        start = time.perf_counter()
        self.run()
        finish_work()
        end = time.perf_counter()
        self.check()
        return end - start

    def products(self) -> int:
        """Floating-point operations of its matrix products; it runs once, untimed."""
        self.prepare()
        with FlopCounterMode(display=False) as counter:
            self.run()
        self.check()
        return counter.get_total_flops()

    def peak_bytes(self) -> int:
        """Most bytes in tensors at one moment of the step; it runs once, untimed."""
        self.prepare()
        with TensorMemory() as memory:
            self.run()
        self.check()
        return self.weights + memory.peak


def matrix_products(dtype: torch.dtype, rows: int, device: str) -> Step:
    """Products of a ViT-B/16's shapes and nothing else: what the machine gives at most.

    Args:
        rows: of the matrices, as many as a batch has tokens.
    """
    tokens, wide = (torch.randn(rows, width, dtype=dtype, device=device) for width in (768, 3072))
    up = torch.randn(3072, 768, dtype=dtype, device=device)
    down = up.t().contiguous()

    def run() -> None:
        for _ in range(10):
            F.linear(tokens, up)
            F.linear(wide, down)

    return Step(run, 0)


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
    backbone: PreTrainedModel, pixel_values: torch.Tensor, labels: torch.Tensor, extra_tokens: int
) -> tuple[Step, Step]:
    """The bare model's forward, and its forward and backward, with `extra_tokens` more than its own.

    The model's own forward runs. A hook appends the tokens to the embeddings, and makes these the place from which
    gradients are wanted: no weight needs one, and every layer sends its activations' gradients back.
    """
    encoder = encoder_of(backbone)
    size = family_of(backbone).hidden_size(encoder)
    extra = torch.randn(len(pixel_values), extra_tokens, size).to(backbone.classifier.weight)
    embeddings: list[torch.Tensor] = []

    def lengthen(module: nn.Module, inputs: tuple, output: Any) -> Any:
        tokens, *rest = output if isinstance(output, tuple) else (output,)  # Swin's come with their grid
        tokens = torch.cat([tokens, extra], dim=1) if extra_tokens else tokens
        embeddings[:] = [tokens.requires_grad_(torch.is_grad_enabled())]
        return (tokens, *rest) if rest else tokens

    def passes() -> torch.Tensor:
        with encoder.embeddings.register_forward_hook(lengthen):
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


def reference_steps(backbone: PreTrainedModel, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[Step, Step]:
    """A step of the shape of the public CODA-Prompt code, on the plain HF model, without its prompts.

    Two whole passes; the query's without gradient, the other with gradients to all weights, which are then not used.
    """
    model = copy.deepcopy(backbone).requires_grad_(True)

    def train() -> None:
        with torch.no_grad():
            model(pixel_values)
        F.cross_entropy(model(pixel_values).logits.float(), labels).backward()

    def evaluate() -> None:
        with torch.no_grad():
            model(pixel_values)
            model(pixel_values)

    def prepare() -> None:
        model.zero_grad(set_to_none=True)

    weights = module_bytes(model)
    return Step(train, weights, prepare, prepare), Step(evaluate, weights, prepare)


def method_steps(
    model: PeftModel, pixel_values: torch.Tensor, labels: torch.Tensor, query: torch.Tensor | None = None
) -> tuple[Step, Step]:
    """The prompted model's training step and evaluation step; with a `query` from a cache, without the query pass."""

    def prepare_training() -> None:
        model.train()
        model.zero_grad(set_to_none=True)

    def train() -> None:
        model(pixel_values=pixel_values, labels=labels, query=query).loss.backward()

    def check_training() -> None:
        check_gradients(model)
        model.zero_grad(set_to_none=True)

    def evaluate() -> None:
        with torch.no_grad():
            model(pixel_values=pixel_values, query=query)

    weights = module_bytes(model)
    return Step(train, weights, prepare_training, check_training), Step(evaluate, weights, model.eval)
