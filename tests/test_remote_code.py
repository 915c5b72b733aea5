"""Code that comes with a model, a processor or an adapter is not run unless the user says so, and nobody is asked."""

from __future__ import annotations

import builtins
import json
import shutil

import pytest

from peft_cl.cli import main
from peft_cl.commands.errors import CommandError
from peft_cl.commands.sources import load_backbone, load_processor


CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("run")
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil
class OwnConfig(ViTConfig):
    model_type = "own-vit"
class OwnModel(ViTForImageClassification):
    config_class = OwnConfig
class OwnProcessor(ViTImageProcessorPil):
    pass
"""
MAPS = {
    "config": {"AutoConfig": "own.OwnConfig", "AutoModelForImageClassification": "own.OwnModel"},
    "model": {"AutoModelForImageClassification": "own.OwnModel"},
    "processor": {"AutoImageProcessor": "own.OwnProcessor"},
}


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("the user was asked"))


@pytest.fixture
def hostile(place, tmp_path):
    """`hostile(kind, folder)`: a copy of the model with code of its own, and the file that the code would write."""

    def make(kind: str, folder=None, known: bool = False):
        folder = folder or tmp_path / "hostile"
        shutil.copytree(place / "model", folder, dirs_exist_ok=True)
        mark = tmp_path / "mark"
        (folder / "own.py").write_text(CODE.format(mark=str(mark)))
        file = folder / ("preprocessor_config.json" if kind == "processor" else "config.json")
        content = json.loads(file.read_text())
        content["auto_map"] = MAPS[kind]
        if not known:
            content |= {"image_processor_type": "OwnProcessor"} if kind == "processor" else {"model_type": "own-vit"}
        file.write_text(json.dumps(content))
        return folder, mark

    return make


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", MAPS)
def test_no_loader_of_ours_runs_code(kind, known, hostile):
    folder, mark = hostile(kind, known=known)
    load = load_processor if kind == "processor" else lambda name: load_backbone(name, "float32")
    if known:  # transformers has a class of that name: it is taken, and the other is not looked at
        load(str(folder))
    else:
        with pytest.raises(CommandError) as caught:
            load(str(folder))
        assert "auto_map" in str(caught.value) or "own-vit" in str(caught.value) or "OwnProcessor" in str(caught.value)
    assert not mark.exists()


def test_code_is_run_where_the_user_says_so(hostile, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = hostile("config")
    with pytest.raises(CommandError, match="set model.trust_remote_code to true .*--trust-remote-code"):
        load_backbone(str(folder), "float32")
    assert not mark.exists()
    assert type(load_backbone(str(folder), "float32", None, True)).__name__ == "OwnModel"
    assert mark.read_text() == "run"


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("where", ["backbone", "base model", "adapter"])
def test_an_adapter_brings_no_code(where, kind, hostile, trained, place, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    if where == "adapter":  # its own preprocessor_config.json, or a config.json that makes it a model besides
        _, mark = hostile(kind, run)
    else:
        base, mark = hostile(kind, run / "backbone" if where == "backbone" else tmp_path / "base")
        config = json.loads((run / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(base)
        (run / "adapter_config.json").write_text(json.dumps(config))
        if kind == "processor":
            (run / "preprocessor_config.json").unlink()
    status = main(["evaluate", str(run), "--dataset", str(place / "data")])
    error = capsys.readouterr().err
    assert not mark.exists()
    assert status == (0 if where == "adapter" and kind != "processor" else 2), error
    status = main(["info", str(run)])
    assert not mark.exists()


def test_training_is_asked_by_a_setting(hostile, train, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = hostile("processor")
    assert train("--model.name", str(folder)) == 2
    assert "auto_map" in capsys.readouterr().err and not mark.exists()


def test_sizes_that_no_weights_have_are_refused_before_they_are_made(place, tmp_path):
    for name, value in {
        "num_hidden_layers": 10**6,
        "hidden_size": 10**9,
        "image_size": 10**6,
        "intermediate_size": 250_000,
        "num_channels": -1,
        "patch_size": "8",
    }.items():
        folder = tmp_path / name
        shutil.copytree(place / "model", folder)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(
                {**content, name: value, "hidden_size": content["hidden_size"] if name != "hidden_size" else value}
            )
        )
        with pytest.raises(CommandError, match="cannot be loaded"):
            load_backbone(str(folder), "float32")


@pytest.mark.parametrize(
    "size", [{"height": 10**6, "width": 10**6}, {"shortest_edge": 10**6}, {"height": 0, "width": 16}]
)
def test_a_processor_makes_no_images_of_impossible_sizes(size, place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    file = tmp_path / "model" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": size}))
    with pytest.raises(CommandError, match="size is .*from 1 to 8,192"):
        load_processor(str(tmp_path / "model"))
    with pytest.raises(CommandError, match="size is .*from 1 to 8,192"):
        load_processor(str(place / "model"), {"size": size})


def test_a_backbone_that_is_not_all_there_is_refused(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 3}))
    with pytest.raises(CommandError, match="lacks .*which would be random numbers"):
        load_backbone(str(tmp_path / "model"), "float32")
    shutil.copytree(place / "model", tmp_path / "spoilt")
    model = load_backbone(str(tmp_path / "spoilt"), "float32")
    model.vit.layernorm.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "spoilt")
    with pytest.raises(CommandError, match="vit.layernorm.weight.*not finite"):
        load_backbone(str(tmp_path / "spoilt"), "float32")
