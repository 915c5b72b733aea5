"""transformers' own ways to an adapter, without a PeftModel: the checks are the same; other methods are left alone."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from tuner_cases import METHODS, logits, prompted, tiny

from peft_cl.tuners.base.bare_models import enter_transformers


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


@pytest.fixture
def saved(tmp_path):
    """`saved(name)`: the model, and the folder of its adapter, whose base model is a folder as well."""

    def save(name: str = "coda", **words):
        tiny().save_pretrained(tmp_path / "base")
        model = prompted(name, AutoModelForImageClassification.from_pretrained(tmp_path / "base"), **words)
        model.save_pretrained(tmp_path / "adapter")
        return model, tmp_path / "adapter"

    return save


def change(folder, tensors=None, drop=(), **facts):
    content = load_file(folder / WEIGHTS)
    content = {name: value for name, value in content.items() if not any(part in name for part in drop)}
    save_file({**content, **(tensors or {})}, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **facts}))


WAYS = {
    "AutoModel": lambda folder: AutoModelForImageClassification.from_pretrained(folder),
    "load_adapter": lambda folder: tiny().load_adapter(str(folder)),
    "PeftModel": lambda folder: PeftModel.from_pretrained(tiny(), folder),
}
every_way = pytest.mark.parametrize("way", WAYS)


@every_way
@pytest.mark.parametrize(
    "surplus", [f"{PREFIX}vit.layernorm.weight", "vit.layernorm.weight", f"{PREFIX}vit.layers.0.mlp.fc1.bias", "extra"]
)
def test_a_surplus_tensor_is_refused(way, surplus, saved):
    _, folder = saved()
    change(folder, {surplus: torch.zeros(48 if "fc1" in surplus else 24)})
    with pytest.raises(ValueError, match="that the adapter does not know"):
        WAYS[way](folder)


@every_way
@pytest.mark.parametrize("part", ["head.weight", "head", "pool.keys", "pool"])
def test_a_missing_tensor_is_refused(way, part, saved):
    _, folder = saved()
    change(folder, {"x": torch.ones(1)} if part == "head" else None, drop=[part])
    with pytest.raises(ValueError, match="adapter file lacks"):
        WAYS[way](folder)


@every_way
def test_spoilt_numbers_and_facts_are_refused(way, saved):
    _, folder = saved()
    key = f"{PREFIX}classifier.codaprompt_head.bias"
    for value, message in (
        (torch.full((6,), torch.nan), "not finite"),
        (torch.zeros(6, dtype=torch.int8), "numbers of another kind"),
        (torch.zeros(7), r"file \(7,\), model \(6,\)"),
    ):
        change(folder, {key: value})
        with pytest.raises(ValueError, match=message):
            WAYS[way](folder)
    change(folder, {key: torch.zeros(6)}, tasks=[[0, 1], [5, 4]])
    with pytest.raises(ValueError, match="tasks is"):
        WAYS[way](folder)


def test_a_base_model_that_refused_an_adapter_answers_as_before(saved):
    model, folder = saved()
    base = tiny()
    expected = logits(base)
    change(folder, {"extra": torch.ones(1)})
    with pytest.raises(ValueError, match="does not know"):
        base.load_adapter(str(folder))
    assert torch.equal(logits(base), expected) and len(base.config.id2label) == 12
    change(folder, drop=["extra"])
    base.load_adapter(str(folder))
    assert torch.equal(logits(base), logits(model))
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        base.load_adapter(str(folder))


@pytest.mark.parametrize("name", METHODS)
def test_the_base_is_compared_here_too(name, saved, tmp_path):
    model, folder = saved(name)
    with pytest.warns(UserWarning, match="trained on other weights"):
        tiny(seed=1).load_adapter(str(folder))
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(model)) and not loaded.training
    assert not any(value.requires_grad for name, value in loaded.named_parameters() if "_head" in name)
    answer, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and torch.equal(logits(answer), logits(model))


def test_an_adapter_of_ones_own_tensors_and_words(saved, tmp_path):
    model, folder = saved()
    base = tiny()
    config = model.peft_config["default"]
    weights = {key.removeprefix(PREFIX): value for key, value in load_file(folder / WEIGHTS).items()}
    base.load_adapter(adapter_state_dict=weights, peft_config=config, adapter_name="mine", is_trainable=True)
    assert torch.equal(logits(base), logits(model)) and base.active_adapters() == ["mine"]
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(tmp_path / "outer" / "inner" / file.name)
    base = tiny()
    base.load_adapter(str(tmp_path / "outer"), adapter_kwargs={"subfolder": "inner"})
    assert torch.equal(logits(base), logits(model))


def test_adapters_of_other_methods_are_loaded_as_ever(tmp_path):
    enter_transformers()
    lora = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    base = tiny()
    info = base.load_adapter(str(tmp_path))
    assert not info.missing_keys and torch.allclose(logits(base), logits(lora))
    with pytest.raises((ValueError, OSError)):
        base.load_adapter(str(tmp_path / "nowhere"), "other")
