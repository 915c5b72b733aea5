"""The matrix of methods and forms that the tuner tests run over, and the tiny models they run on."""

from __future__ import annotations

from typing import Any

import torch
from backbone_cases import COMMON
from peft import PeftModel, get_peft_model
from transformers import DeiTConfig, DeiTForImageClassification, PreTrainedModel, ViTConfig, ViTForImageClassification

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig, LinearProbeConfig


#: Name -> (configuration class, preset or None, fields). All forms, small enough for three layers of width 24.
CASES: dict[str, tuple[type, str | None, dict[str, Any]]] = {
    "l2p": (L2PConfig, None, {"pool_size": 6, "prompt_length": 3, "top_k": 2}),
    "l2p-deep": (L2PConfig, "deep", {"pool_size": 6, "prompt_length": 4, "top_k": 2, "layers": [0, 1, 2]}),
    "l2p++": (L2PConfig, "l2p++", {"pool_size": 6, "prompt_length": 4, "top_k": 2}),
    "l2p-textbook": (L2PConfig, "textbook", {"pool_size": 6, "prompt_length": 3, "top_k": 2}),
    "dualprompt": (DualPromptConfig, None, {"pool_size": 5, "prompt_length": 3, "g_layers": [0], "layers": [1, 2]}),
    "dualprompt-coda": (DualPromptConfig, "coda", {"prompt_length": 3, "g_layers": [0], "layers": [1, 2]}),
    "dualprompt-textbook": (
        DualPromptConfig,
        "textbook",
        {"prompt_length": 3, "separation_coefficient": 0.1, "expert_choice": "task"},
    ),
    "dualprompt-key": (DualPromptConfig, "textbook", {"prompt_length": 3, "pool_size": 4}),
    "coda-shared": (CodaPromptConfig, "textbook", {"prompt_length": 3, "pool_size": 4}),
    "dualprompt-general": (DualPromptConfig, None, {"g_prompt_length": 3, "g_layers": [0, 1], "layers": []}),
    "coda": (CodaPromptConfig, None, {"components_per_task": 2, "prompt_length": 4, "layers": [0, 2]}),
    "coda-paper": (CodaPromptConfig, "paper", {"components_per_task": 2, "prompt_length": 4, "layers": [0, 2]}),
    "coda-textbook": (CodaPromptConfig, "textbook", {"components_per_task": 2, "prompt_length": 3}),
    "coda-layer-mean": (
        CodaPromptConfig,
        None,
        {"components_per_task": 2, "prompt_length": 4, "layers": [0, 2], "query_source": "layer_mean"},
    ),
    "linear-probe": (LinearProbeConfig, None, {}),
}
METHODS = ("l2p", "dualprompt", "coda", "linear-probe")
FAMILIES = ("vit", "deit")
CLASSES_PER_TASK = 3


def tiny(family: str = "vit", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random classifier in evaluation mode, the same for the same seed: images (B, 3, 16, 16), 4 patches."""
    fields = {**COMMON, "num_labels": 12, **overrides}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "deit":
            return DeiTForImageClassification(DeiTConfig(**fields)).eval()
        return ViTForImageClassification(ViTConfig(**fields)).eval()


def config(name: str, **overrides: Any) -> Any:
    config_class, preset, fields = CASES[name]
    fields = {**fields, **overrides}
    return config_class.from_preset(preset, **fields) if preset else config_class(**fields)


def task_names(task: int) -> list[str]:
    return [f"class {task * CLASSES_PER_TASK + index}" for index in range(CLASSES_PER_TASK)]


def prompted(
    name: str, base: PreTrainedModel | str = "vit", *, tasks: int = 2, seed: int = 0, **overrides: Any
) -> PeftModel:
    """An adapter of the case `name` with `tasks` tasks begun, in evaluation mode, every number of it set to noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(tiny(base) if isinstance(base, str) else base, config(name, **overrides))
        for task in range(tasks):
            begin(model, task)
    return model.eval()


def begin(model: PeftModel, task: int) -> None:
    """Begin `task`, and end it in one stroke: all that it may train gets noise."""
    model.begin_task(task_names(task))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def images(batch: int = 4, seed: int = 0, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def labels(model: PeftModel, batch: int = 4) -> torch.Tensor:
    """Labels of the current task's classes."""
    rows = torch.tensor(model.peft_config[model.active_adapter].tasks[-1])
    return rows[torch.arange(batch) % len(rows)]


def logits(model: torch.nn.Module, batch: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(images() if batch is None else batch, **inputs).logits


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if "_pool." in name or "_head." in name}


def gradients(model: PeftModel) -> dict[str, torch.Tensor | None]:
    return {name: value.grad for name, value in adapter_parameters(model).items()}


def step(model: PeftModel) -> torch.Tensor:
    """Loss of one training batch, with its gradients left in place."""
    model.train()
    model.zero_grad()
    loss = model(pixel_values=images(), labels=labels(model)).loss
    loss.backward()
    return loss.detach()
