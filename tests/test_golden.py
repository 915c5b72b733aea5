"""The three methods against numbers from their reference implementations (see tests/golden/README.md).

Other vectors of the same layout are checked with `PEFT_CL_GOLDEN=folder pytest -k golden`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import ViTForImageClassification

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig


FOLDER = Path(os.environ.get("PEFT_CL_GOLDEN", Path(__file__).parent / "golden"))
ABSOLUTE = 1e-4  # on logits and losses
RELATIVE = 1e-4  # on gradients, to the tensor's norm


class Golden:
    """One case: its settings and tensors."""

    def __init__(self, name: str):
        self.settings = json.loads((FOLDER / f"{name}.json").read_text())
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        self.task = self.settings["task"]
        self.classes = self.settings["classes_per_task"]
        self.seen = (self.task + 1) * self.classes

    def layers(self, name: str) -> list[int]:
        return sorted(int(key.rpartition("_")[2]) for key in self.tensors if key.startswith(f"param.{name}_"))

    def stacked(self, kind: str, name: str) -> torch.Tensor:
        """Tensors kept layer by layer, (layers, ...)."""
        return torch.stack([self.tensors[f"{kind}.{name}_{layer}"] for layer in self.layers(name)])

    def model(self, config, parameters: dict[str, torch.Tensor], num_tasks: int | None = None):
        """A model with the case's tasks begun through the public API, and the reference's parameters in its pool.

        `parameters` hold all rows; those of past tasks go to the buffers, the rest to the parameters.
        """
        base = ViTForImageClassification.from_pretrained(FOLDER / "backbone")
        model = get_peft_model(base, config)
        for task in range(num_tasks or self.task + 1):
            group = min(task, self.settings["num_tasks"] - 1)  # spare rows of a larger pool: known classes again
            model.begin_task([f"class {group * self.classes + i}" for i in range(self.classes)])
        with torch.no_grad():
            for name, value in parameters.items():
                split_rows(model.pool, name, value)
            head = model.head.entries["default"]
            head.weight.copy_(base.classifier.base_layer.weight[: head.out_features])
            head.bias.copy_(base.classifier.base_layer.bias[: head.out_features])
        return model

    def check_evaluation(self, model):
        model.eval()
        with torch.no_grad():
            logits = model(self.tensors["pixel_values"]).logits
        expected = self.tensors["eval.logits"][:, : logits.shape[1]]
        torch.testing.assert_close(logits, expected, atol=ABSOLUTE, rtol=0)

    def check_training(self, model):
        """Query, logits and losses of the training mode; leaves the gradients of the loss in place."""
        tensors = self.tensors
        torch.testing.assert_close(model.query(tensors["pixel_values"]), tensors["query"], atol=ABSOLUTE, rtol=0)
        model.train()
        output = model(pixel_values=tensors["pixel_values"], labels=tensors["labels"])
        current = slice(self.task * self.classes, self.seen)
        torch.testing.assert_close(
            output.logits[:, current], tensors["train.logits"][:, current], atol=ABSOLUTE, rtol=0
        )
        assert torch.isneginf(output.logits[:, : self.task * self.classes]).all()
        losses = model.head.last_losses
        torch.testing.assert_close(losses["cross_entropy"], tensors["train.cross_entropy"], atol=ABSOLUTE, rtol=0)
        if "train.loss" in tensors:
            torch.testing.assert_close(output.loss, tensors["train.loss"], atol=ABSOLUTE, rtol=0)
        output.loss.backward()
        return losses

    def check_gradients(self, model, gradients: dict[str, torch.Tensor]):
        """Every reference gradient; rows of past tasks have none, which the reference must confirm."""
        for name, expected in gradients.items():
            close_in_norm(name, *gradient_of_rows(model.pool, name, expected))
        head = model.head.entries["default"]
        weight, bias = (
            self.tensors.get(f"grad.{part}", self.tensors.get(f"grad.{other}"))
            for part, other in (("head.weight", "classifier.weight"), ("head.bias", "classifier.bias"))
        )
        close_in_norm("head", head.weight.grad, weight[: self.seen])
        if bias is not None:
            close_in_norm("head bias", head.bias.grad, bias[: self.seen])


def split_rows(pool, name: str, value: torch.Tensor) -> None:
    parameter = getattr(pool, name)
    if name in pool.row_axes:
        axis, past = pool.row_axes[name], pool.past(name)
        first, rows = past.shape[axis], parameter.shape[axis]
        past.copy_(value.narrow(axis, 0, first))
        value = value.narrow(axis, first, rows)
    parameter.copy_(value)


def gradient_of_rows(pool, name: str, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parameter = getattr(pool, name)
    if name not in pool.row_axes:
        return parameter.grad, expected
    axis = pool.row_axes[name]
    first, rows = pool.past(name).shape[axis], parameter.shape[axis]
    others = expected.clone()
    others.narrow(axis, first, rows).zero_()
    assert others.abs().max() == 0, f"the reference moves rows of {name} outside the current task"
    return parameter.grad, expected.narrow(axis, first, rows)


def close_in_norm(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape, f"{name}: {tuple(found.shape)} for {tuple(expected.shape)}"
    distance = (found - expected).norm() / expected.norm()
    assert distance <= RELATIVE, f"gradient of {name} differs by {distance:.2e} of its norm"


def halves(stacked: torch.Tensor) -> torch.Tensor:
    """(layers, M, L, D), first half keys and second values -> (layers, 2, M, L / 2, D)."""
    return torch.stack(stacked.chunk(2, dim=-2), dim=1)


def test_golden_coda():
    case = Golden("coda")
    settings = case.settings
    config = CodaPromptConfig(
        components_per_task=settings["pool_size"] // settings["num_tasks"],
        prompt_length=settings["prompt_length"],
        layers=settings["layers"],
        orthogonality_coefficient=settings["ortho_mu"],
    )
    names = {"prompts": "e_p", "keys": "e_k", "attention": "e_a"}
    model = case.model(config, {name: case.stacked("param", short) for name, short in names.items()})
    case.check_evaluation(model)
    losses = case.check_training(model)
    torch.testing.assert_close(losses["orthogonality"], case.tensors["train.prompt_loss"], atol=ABSOLUTE, rtol=0)
    case.check_gradients(model, {name: case.stacked("grad", short) for name, short in names.items()})


def test_golden_dualprompt_keys_per_layer():
    case = Golden("dualprompt")
    settings = case.settings
    config = DualPromptConfig(
        pool_size=settings["pool_size"],
        prompt_length=settings["e_prompt_length"] // 2,
        g_prompt_length=settings["g_prompt_length"] // 2,
        layers=settings["e_layers"],
        g_layers=settings["g_layers"],
        keys_per_layer=True,
        pull_form="cosine_distance",
        pull_reduction="sum",
    )

    def tensors(kind: str) -> dict[str, torch.Tensor]:
        return {
            "prompts": halves(case.stacked(kind, "e_p")),
            "keys": case.stacked(kind, "e_k"),
            "g_prompts": torch.stack(case.stacked(kind, "g_p").chunk(2, dim=-2), dim=1),
        }

    model = case.model(config, tensors("param"))
    check_dualprompt_evaluation(case, config, tensors("param"))
    losses = case.check_training(model)
    torch.testing.assert_close(losses["pull"], case.tensors["train.prompt_loss"], atol=ABSOLUTE, rtol=0)
    case.check_gradients(model, tensors("grad"))


def test_golden_dualprompt_shared_keys():
    case = Golden("dualprompt_shared_keys")
    settings = case.settings
    config = DualPromptConfig(
        pool_size=settings["pool_size"],
        prompt_length=settings["prompt_length"],
        g_prompt_length=case.tensors["param.g_prompt"].shape[2],
        pull_coefficient=settings["pull_coefficient"],
    )

    def tensors(kind: str) -> dict[str, torch.Tensor]:
        return {
            "prompts": case.tensors[f"{kind}.e_prompt.prompt"].flatten(-2),
            "keys": case.tensors[f"{kind}.e_prompt.prompt_key"][None],
            "g_prompts": case.tensors[f"{kind}.g_prompt"].flatten(-2),
        }

    model = case.model(config, tensors("param"))
    losses = case.check_training(model)
    similarity = -losses["pull"] / settings["pull_coefficient"]
    torch.testing.assert_close(similarity, case.tensors["train.similarity"], atol=ABSOLUTE, rtol=0)
    case.check_gradients(model, tensors("grad"))
    complete = check_dualprompt_evaluation(case, config, tensors("param"))
    check_selection(case, model, "train")
    check_selection(case, complete, "eval")


def check_dualprompt_evaluation(case: Golden, config: DualPromptConfig, parameters: dict[str, torch.Tensor]):
    """At test the references choose among all rows of the pool, also those of tasks to come; ours do not exist yet.

    So the reference's evaluation is that of a model with all tasks begun.
    """
    complete = case.model(config, parameters, num_tasks=config.pool_size)
    case.check_evaluation(complete)
    return complete


@pytest.mark.parametrize("name", ["l2p", "l2p_batchwise", "l2p_cls_positions"])
def test_golden_l2p(name: str):
    case = Golden(name)
    settings = case.settings
    config = L2PConfig(
        pool_size=settings["pool_size"],
        prompt_length=settings["prompt_length"],
        top_k=settings["top_k"],
        pull_coefficient=settings["pull_coefficient"],
        prompt_positions=settings["prompt_positions"],
        batchwise_prompt=settings["batchwise_prompt"],
        batchwise_prompt_at_test=settings["batchwise_prompt"],
    )

    def tensors(kind: str) -> dict[str, torch.Tensor]:
        return {
            "prompts": case.tensors[f"{kind}.prompt.prompt"][None],
            "keys": case.tensors[f"{kind}.prompt.prompt_key"][None],
        }

    model = case.model(config, tensors("param"))
    case.check_evaluation(model)
    losses = case.check_training(model)
    similarity = -losses["pull"] / settings["pull_coefficient"]
    torch.testing.assert_close(similarity, case.tensors["train.similarity"], atol=ABSOLUTE, rtol=0)
    case.check_gradients(model, tensors("grad"))
    check_selection(case, model, "train")
    check_selection(case, model, "eval")


def check_selection(case: Golden, model, mode: str) -> None:
    """The same rows are chosen; their order carries no meaning."""
    model.train(mode == "train")
    with torch.no_grad():
        selected = model.pool(model.query(case.tensors["pixel_values"])).selected
    assert torch.equal(selected.sort(-1).values, case.tensors[f"{mode}.selected"].sort(-1).values)


def test_golden_l2p_deep():
    case = Golden("l2p_deep")
    settings = case.settings
    config = L2PConfig(
        pool_size=settings["pool_size"],
        prompt_length=settings["prompt_length"],
        top_k=settings["top_k"],
        prompt_type="prefix",
        layers=settings["layers"],
        keys_per_layer=True,
        head_type="cls",
    )
    model = case.model(config, {"prompts": case.stacked("param", "e_p"), "keys": case.stacked("param", "e_k")})
    case.check_evaluation(model)
    case.check_training(model)
