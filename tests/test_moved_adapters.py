"""Adapters name base models that are found on the next machine too."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from PIL import Image
from trainer_cases import CONFIGS
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification, pipeline

from peft_cl import L2PConfig, LinearProbeConfig
from peft_cl.assets import default_backbone
from peft_cl.assets.resolving import portable_name
from peft_cl.cli import main
from peft_cl.strategies import FineTuning


ELSEWHERE = "/home/anna/venv/lib/python3.11/site-packages/peft_cl/assets/vit-tiny-64"
IMAGE = Image.new("RGB", (64, 64), (200, 40, 40))


@pytest.fixture
def embedded(tmp_path):
    """An adapter on the embedded backbone in `adapter`, and its logits."""
    base = AutoModelForImageClassification.from_pretrained(default_backbone(), dtype="float32")
    torch.manual_seed(0)
    model = get_peft_model(base, L2PConfig(pool_size=4, prompt_length=2, top_k=2))
    model.begin_task(["ant", "bee", "cat"])
    model.save_pretrained(tmp_path / "adapter")
    AutoImageProcessor.from_pretrained(default_backbone()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)).logits


def test_the_embedded_backbone_is_named_and_found_by_every_loader(embedded):
    folder, expected = embedded
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "vit-tiny-64"
    assert torch.equal(logits(AutoPeftModel.from_pretrained(str(folder))), expected)
    assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(folder)), expected)
    found = pipeline("image-classification", model=str(folder), device="cpu")(IMAGE)
    assert {entry["label"] for entry in found} == {"ant", "bee", "cat"}


def test_an_adapter_from_another_machine_is_found_too(embedded):
    """It was saved by an earlier version, by the path of its machine."""
    folder, expected = embedded
    facts = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**facts, "base_model_name_or_path": ELSEWHERE}))
    assert PeftConfig.from_pretrained(str(folder)).base_model_name_or_path == "vit-tiny-64"
    assert torch.equal(logits(AutoPeftModel.from_pretrained(str(folder))), expected)


@pytest.mark.parametrize(
    "name",
    ["google/vit-base", "/home/anna/models/vit-tiny-64", "/x/peft_cl/assets/other", "assets/vit-tiny-64", "", None],
)
def test_other_names_stay_as_they_are(name):
    assert portable_name(name) == name


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch, tiny_vit):
    tiny_vit().save_pretrained(tmp_path / "vit-tiny-64")
    monkeypatch.chdir(tmp_path)
    assert AutoModelForImageClassification.from_pretrained("vit-tiny-64").config.hidden_size == 48
    with pytest.raises(OSError, match="couldn't find them"):
        AutoModelForImageClassification.from_pretrained("vit-tiny-65")


def test_a_fine_tuned_backbone_moves_with_its_adapter(make_trainer, tmp_path, data):
    trainer = make_trainer(LinearProbeConfig(train_mask=False), strategy=FineTuning(), num_train_epochs=1)
    trainer.train()
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad():
        expected = trainer.model.eval()(pixels).logits
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert str(tmp_path) not in (tmp_path / "moved" / "adapter_config.json").read_text()
    folder = str(tmp_path / "moved")
    by_hand = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(f"{folder}/backbone"), folder)
    for model in (
        by_hand,
        AutoPeftModel.from_pretrained(folder),
        AutoModelForImageClassification.from_pretrained(folder),
    ):
        with torch.no_grad():
            assert torch.equal(model.eval()(pixels).logits, expected)
    found = pipeline("image-classification", model=folder, device="cpu")(IMAGE)
    assert found[0]["label"] in trainer.scenario.classes


def test_an_overwritten_run_leaves_no_backbone_behind(train, tmp_path):
    words = ("--preset", "null", "--adapter", "null", "--training.max_steps", "1")
    assert train("--method", "fine-tuning", *words) == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert train("--method", "linear-probe", *words, "--overwrite") == 0
    assert not [path for path in (tmp_path / "out").iterdir() if path.name in ("config.json", "model.safetensors")]
    assert main(["info", str(tmp_path / "out")]) == 0


def test_configs_of_others_are_read_as_before(tmp_path, tiny_vit):
    CONFIGS["l2p"]().save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path is None
