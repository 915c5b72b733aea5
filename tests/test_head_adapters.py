"""Adapters with other heads than the linear one: what PEFT users do with them works, in both families."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tuner_cases import FAMILIES, images, logits, task_names, tiny

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig, LinearProbeConfig


SMALL = {"prompted": "lda", "prompted_options": {"shrinkage": 0.3}, "query_options": {"fourier": 8, "shrinkage": 0.3}}
#: The presets "best" with kernels and pools that are small, and forms that they do not have.
CASES = {
    "l2p": lambda: L2PConfig.from_preset("best", head_options=SMALL, pool_size=6, top_k=2, layers=[0, 1, 2]),
    "dualprompt": lambda: DualPromptConfig.from_preset("best", head_options=SMALL, g_layers=[0], layers=[1, 2]),
    "coda": lambda: CodaPromptConfig.from_preset("best", head_options=SMALL, components_per_task=2, layers=[0, 2]),
    "frozen": lambda: LinearProbeConfig.from_preset("best", head_options={"fourier": 8, "shrinkage": 0.3}),
    "l2p-tokens": lambda: L2PConfig(pool_size=6, prompt_length=3, top_k=2, head="lda", head_features="cls+mean+query"),
    "coda-tokens": lambda: CodaPromptConfig.from_preset(
        "textbook", components_per_task=2, prompt_length=3, head="ridge", head_features="mean", head_layers=3
    ),
    "aligned": lambda: CodaPromptConfig(
        components_per_task=2, layers=[0, 2], head="aligned", head_features="cls+mean", head_options={"samples": 4}
    ),
    "cosine": lambda: DualPromptConfig(
        g_layers=[0], layers=[1], head="cosine", head_features="cls+mean", head_layers=2
    ),
}


def batch_of(task: int) -> tuple[torch.Tensor, torch.Tensor]:
    return images(12, seed=task) + 0.5 * task, torch.arange(12) % 3 + 3 * task


def taught(name: str, base: torch.nn.Module | str = "vit", tasks: int = 2) -> PeftModel:
    """An adapter that has learnt tasks of three classes: a step of training each, and what its head observes."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(base) if isinstance(base, str) else base, CASES[name]())
    for task in range(tasks):
        teach(model, task)
    return model.eval()


def teach(model: PeftModel, task: int) -> None:
    model.begin_task(task_names(task))
    pixels, labels = batch_of(task)
    loss = model.train()(pixel_values=pixels, labels=labels).loss
    if loss.requires_grad:
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    if model.head.active.observes:
        model.fit_head([{"pixel_values": pixels, "labels": labels}])
    model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_it_is_saved_loaded_and_goes_on(name, family, tmp_path):
    model = taught(name, family)
    model.save_pretrained(tmp_path)
    model.save_sums(tmp_path)
    expected = logits(model, images(6, seed=9))
    assert expected.shape == (6, 6) and expected.isfinite().all()
    loaded = PeftModel.from_pretrained(tiny(family), tmp_path)
    torch.testing.assert_close(logits(loaded, images(6, seed=9)), expected, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = PeftModel.from_pretrained(tiny(family), tmp_path, is_trainable=True)
    for each in (model, again):
        teach(each, 2)
    if name == "frozen":
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert logits(again).shape == (4, 9) and logits(again).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_the_base_model_stays_what_it_is(name, family):
    base = tiny(family)
    expected = logits(base)
    model = taught(name, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


@pytest.mark.parametrize("name", CASES)
def test_copies_and_pickles_answer_alike(name):
    model = taught(name)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)
        teach(other, 2)  # its sums came along
    assert logits(model).shape == (4, 6)


@pytest.mark.parametrize("name", CASES)
def test_a_bfloat16_backbone_under_a_float32_head(name):
    model, exact = taught(name, tiny().to(torch.bfloat16)), taught(name)
    found, expected = logits(model, batch_of(0)[0]), logits(exact, batch_of(0)[0])
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.6


@pytest.mark.parametrize("name", CASES)
def test_what_the_answer_depends_on(name):
    """Not on the rest of the batch, nor on whether hidden states are asked for or the query is given."""
    model, pixels = taught(name), images(5, seed=3)
    whole = logits(model, pixels)
    alone = torch.cat([logits(model, pixels[place : place + 1]) for place in range(5)])
    scale = whole.abs().max().item()
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-4 * scale)
    with torch.no_grad():
        traced = model(pixels, output_hidden_states=True)
    assert len(traced.hidden_states) == 4
    torch.testing.assert_close(traced.logits, whole, rtol=0, atol=1e-4 * scale)
    query = model.base_model.query(pixels)
    torch.testing.assert_close(logits(model, pixels, query=query), whole, rtol=0, atol=1e-4 * scale)
    masked = logits(model, pixels, task_ids=torch.tensor([0, 1, 0, 1, 0]))
    assert torch.isneginf(masked[0, 3:]).all() and torch.isneginf(masked[1, :3]).all()


def test_a_query_that_is_too_narrow_is_refused():
    model = taught("coda")
    with pytest.raises(ValueError, match="query has 24 numbers an image, but the head reads 144.*base_model.query"):
        logits(model, query=torch.randn(4, 24))


@pytest.mark.parametrize("name", ["l2p", "dualprompt", "coda", "frozen"])
def test_the_features_are_what_their_name_says(name):
    """Recomputed from the hidden states of the frozen model, whose prompts are none."""
    model = taught(name)
    pixels = images(3, seed=5)
    base = tiny()
    with torch.no_grad():
        states = base.vit(pixels, output_hidden_states=True).hidden_states[1:]
        normed = [base.vit.layernorm(state) for state in reversed(states)]
    expected = torch.cat([part for state in normed for part in (state[:, 0], state[:, 1:].mean(1))], dim=1)
    torch.testing.assert_close(model.base_model.query(pixels), expected, rtol=1e-4, atol=1e-4)
    features, query = model.base_model.features(pixels)
    torch.testing.assert_close(features if name == "frozen" else query, expected, rtol=1e-4, atol=1e-4)
    assert features.shape == expected.shape and (name == "frozen" or not torch.allclose(features, expected))


@pytest.mark.parametrize("name", ["l2p", "coda"])
def test_frozen_prompts_are_not_thawed_by_switching_adapters(name, tmp_path):
    model = taught(name)
    model.add_adapter("other", CASES[name]())
    model.set_adapter("other")
    model.set_adapter("default")
    trainable = [key for key, value in model.named_parameters() if value.requires_grad and ".default" in key]
    assert not trainable
    model.train()
    assert not model.base_model.pool.training


def test_the_training_head_is_not_saved(tmp_path):
    model = taught("dualprompt", tasks=1)
    assert model.head.active.training_head is not None
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "training" in key]
    again = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    assert again.head.active.training_head.weight.shape == (3, 24)
