"""An adapter knows the weights of its backbone, in whatever 16-bit format they come, and says when they are others."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForImageClassification
from tuner_cases import METHODS, prompted, tiny

from peft_cl.cli import main
from peft_cl.tuners.base.digests import base_digests, digest_of_tensors


CONFIG = "adapter_config.json"


def told(base, folder, **words) -> list[str]:
    """What loading the adapter on `base` says of its backbone."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(base, folder, **words)
    return [str(each.message) for each in caught if "other weights" in str(each.message)]


def merged(base):
    """The backbone with a LoRA of small weights merged into it."""
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    for name, value in lora.named_parameters():
        if "lora_" in name:
            value.data.mul_(0.1)
    return lora.merge_and_unload()


def nudged(base):
    """The backbone after one small step of a single layer."""
    with torch.no_grad():
        base.vit.layers[1].mlp.fc1.weight.mul_(1.01)
    return base


@pytest.mark.parametrize("name", METHODS)
def test_other_weights_are_told_at_load(name, tmp_path):
    model = prompted(name)
    model.save_pretrained(tmp_path / "adapter")
    assert told(tiny(), tmp_path / "adapter") == []
    assert told(tiny(num_labels=3), tmp_path / "adapter") == []  # another classifier is no other backbone
    for other in (tiny(seed=1), merged(tiny()), nudged(tiny())):
        (message,) = told(other, tmp_path / "adapter")
        assert "'default' was trained on other weights" in message and "Load the backbone it was trained on" in message


@pytest.mark.parametrize(
    ("trained", "loaded", "known"),
    [
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float16, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float16, torch.bfloat16, False),  # each has rounded off what the other kept
    ],
)
def test_a_copy_in_another_format_is_the_same_backbone(trained, loaded, known, tmp_path):
    prompted("coda", tiny().to(trained)).save_pretrained(tmp_path)
    assert told(tiny().to(loaded), tmp_path) == []
    assert len(told(tiny(seed=1).to(loaded), tmp_path)) == known


def test_the_digest_knows_neither_names_nor_order():
    base = tiny().vit
    renamed = torch.nn.ParameterDict({f"x{i}": v for i, v in enumerate(reversed(base.state_dict().values()))})
    assert base_digests(renamed) == base_digests(base) and set(base_digests(base)) == {"bfloat16", "float16"}
    base.layers[0].mlp.fc1.weight = torch.nn.Parameter(
        torch.zeros(48, 24, dtype=torch.int8), requires_grad=False
    )  # as quantised ones are
    assert base_digests(base) == {}


def test_weights_that_are_made_of_several_tensors_have_a_digest():
    first, second = torch.zeros(2), torch.ones(2)
    made = {"w": TwoTensor(first, second)}
    assert digest_of_tensors(made.items()) == digest_of_tensors([("w.a", first), ("w.b", second)])
    module = torch.nn.Module()
    module.register_buffer("w", made["w"])
    assert base_digests(module) == {}  # as of quantised weights


def test_adapters_without_a_digest_and_without_tasks_load_in_silence(tmp_path):
    prompted("l2p").save_pretrained(tmp_path)
    facts = json.loads((tmp_path / CONFIG).read_text())
    del facts["base_weights"]
    (tmp_path / CONFIG).write_text(json.dumps(facts))
    assert told(tiny(seed=1), tmp_path) == []
    prompted("l2p", tasks=0).save_pretrained(tmp_path)
    assert told(tiny(seed=1), tmp_path) == []


def test_saving_again_after_inference_keeps_what_it_was_trained_on(tmp_path):
    prompted("coda").save_pretrained(tmp_path / "first")
    PeftModel.from_pretrained(tiny(seed=1), tmp_path / "first").save_pretrained(tmp_path / "second")
    assert told(tiny(), tmp_path / "second") == [] and len(told(tiny(seed=1), tmp_path / "second")) == 1


def test_going_on_warns_and_then_fits_the_new_backbone(tmp_path):
    prompted("coda").save_pretrained(tmp_path / "first")
    assert len(told(tiny(seed=1), tmp_path / "first", is_trainable=True)) == 1
    with pytest.warns(UserWarning, match="other weights"):
        model = PeftModel.from_pretrained(tiny(seed=1), tmp_path / "first", is_trainable=True)
    model.begin_task(["later"])
    model.save_pretrained(tmp_path / "second")
    assert told(tiny(seed=1), tmp_path / "second") == []


@pytest.mark.parametrize("word", ["evaluate", "train"])
def test_the_command_warns(word, trained, place, tmp_path):
    other = AutoModelForImageClassification.from_pretrained(place / "model")
    with torch.no_grad():
        other.vit.layernorm.weight.add_(0.1)
    folder = trained
    if word == "train":  # which takes no other model by its name: the folder that the adapter names has changed
        folder = tmp_path / "moved"
        folder.mkdir()
        for file in trained.glob("*.*"):
            (folder / file.name).write_bytes(file.read_bytes())
        facts = json.loads((folder / CONFIG).read_text())
        facts["base_model_name_or_path"] = str(tmp_path / "other")
        (folder / CONFIG).write_text(json.dumps(facts))
    other.save_pretrained(tmp_path / "other")
    data = ["--dataset", str(place / "data"), "--model", str(tmp_path / "other")]
    words = {
        "evaluate": ["evaluate", str(folder), *data],
        "train": [
            "train", str(place / "config.yaml"), "--continue-from", str(folder), "--model.name",
            str(tmp_path / "other"), "--output_dir", str(tmp_path / "out"), "--scenario.num_tasks", "2",
            "--preset", "null", "--adapter", "null", "--method", "null",
        ],
    }  # fmt: skip
    with pytest.warns(UserWarning, match=f"other weights than those of {str(tmp_path / 'other')!r}"):
        assert main(words[word]) == 0
