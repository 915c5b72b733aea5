"""A trained adapter exports with its backbone, for any number of images, and the file answers as the model does."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import onnxruntime
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil
from tuner_cases import FAMILIES, METHODS, config, images, logits, prompted, tiny

import peft_cl.exporting
from peft_cl import CodaPromptConfig, L2PConfig, LinearProbeConfig, export_adapter
from peft_cl.cli import main
from peft_cl.exporting import Program


ANY_NUMBER = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6])


def exported(model, example, strict=False):
    return torch.export.export(Program(model).eval(), (example,), dynamic_shapes=ANY_NUMBER, strict=strict).module()


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES[1:])]
)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "strict"])
def test_any_number_of_images(strict, name, family):
    model = prompted(name, family)
    program = exported(model, images(), strict)
    for count in (1, 7):
        batch = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
        torch.testing.assert_close(program(batch), model(batch).logits, atol=1e-5, rtol=1e-4)


def onnx_logits(file, batch):
    session = onnxruntime.InferenceSession(file)
    return torch.from_numpy(session.run(["logits"], {"pixel_values": batch.numpy()})[0])


def computed(kind, **words):
    """An adapter with the head of the preset "best", or another one that is computed, fitted on noise."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(), kind.from_preset("best", **words))
    model.begin_task(["a", "b", "c"])
    batch = torch.randn(30, 3, 16, 16)
    model.fit_head([{"pixel_values": batch, "labels": torch.arange(30) % 3}])
    return model.eval()


def check(file, model, atol=1e-3):
    for count in (1, 7):
        batch = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count)) * 2
        torch.testing.assert_close(onnx_logits(file, batch), logits(model, batch), atol=atol, rtol=1e-3)


# ----------------------------------------------------------------------------------------------- ONNX


def slowly(names):
    return [pytest.param(each, marks=pytest.mark.slow) for each in names]


@pytest.mark.parametrize("name", ["l2p", "linear-probe"])
def test_a_pt2_file_answers_as_the_model_does(name, tmp_path):
    model = prompted(name)
    program = torch.export.load(export_adapter(model, PROCESSOR, tmp_path / "model.pt2")).module()
    torch.testing.assert_close(program(images(7)), logits(model, images(7)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["coda", *slowly(["l2p", "dualprompt", "linear-probe", "l2p-deep", "dualprompt-textbook"])]
)
def test_the_file_answers_as_the_model_does(name, tmp_path):
    model = prompted(name)
    file = export_adapter(model, PROCESSOR, tmp_path / "new" / "model.onnx")
    check(file, model, atol=1e-4)
    assert sorted(file.parent.iterdir()) == [file]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["l2p", "dualprompt-key"])
def test_prompts_are_chosen_by_the_new_image(name, tmp_path):
    """Not those of the images that the export saw: two batches whose choices differ, from image to image too."""
    model = prompted(name)
    file = export_adapter(model, PROCESSOR, tmp_path / "model.onnx")
    batch = images(40, seed=3) * torch.linspace(0.1, 6, 40)[:, None, None, None]
    expected = logits(model, batch)
    chosen = model.base_model.head.last_selected
    assert len(chosen.flatten(0, -2).unique(dim=0)) > 2
    torch.testing.assert_close(onnx_logits(file, batch), expected, atol=1e-4, rtol=1e-3)
    # What would come of one choice for all is something else.
    frozen = logits(model, batch, query=model.query(batch)[:1].expand(40, -1))
    assert (frozen - expected).abs().max() > 1e-2


HEADS = {
    "frozen features, best": (LinearProbeConfig, {}),
    "coda, best": (CodaPromptConfig, {"layers": [0, 1], "prompt_length": 4}),
    "l2p, best": (L2PConfig, {"pool_size": 6, "prompt_length": 4, "top_k": 2, "layers": [0, 1]}),
    "ridge on a random projection": (
        LinearProbeConfig,
        {"head": "ridge", "head_options": {"projection": 100}, "head_layers": 1},
    ),
    "ncm": (LinearProbeConfig, {"head": "ncm", "head_options": {"metric": "cosine"}}),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_are_computed(name, tmp_path):
    kind, words = HEADS[name]
    model = computed(kind, **words)
    program = exported(model, images(), strict=False)
    torch.testing.assert_close(program(images(7)), logits(model, images(7)), atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_heads_that_are_computed_in_onnx(name, tmp_path):
    model = computed(HEADS[name][0], **HEADS[name][1])
    check(export_adapter(model, PROCESSOR, tmp_path / "model.onnx"), model)


@pytest.mark.slow
def test_the_file_says_what_is_needed_around_it(tmp_path):
    model = prompted("coda", task_evidence=6.0)
    model.peft_config["default"].temperature = 2.5
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6])
    processor.image_background = "black"
    file = export_adapter(model, processor, tmp_path / "model.onnx")
    check(file, model)
    said = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    facts = {name: json.loads(value) for name, value in said.items()}
    assert facts["classes"] == [f"class {row}" for row in range(6)] and facts["tasks"] == [[0, 1, 2], [3, 4, 5]]
    assert facts["temperature"] == 2.5 and facts["method"] == "CODA-Prompt"
    torch.testing.assert_close(
        logits(model), onnx_logits(file, images()), atol=1e-3, rtol=1e-3
    )  # as before the export
    steps = facts["preprocessing"]
    assert steps["size"] == {"height": 16, "width": 16} and steps["image_mean"] == [0.4, 0.5, 0.6]
    assert steps["rescale_factor"] == 1 / 255 and steps["resample"] == 2 and steps["background"] == [0, 0, 0]
    for place in (Path(peft_cl.__file__).parents[1], Path(torch.__file__).parent, tmp_path):
        assert str(place).encode() not in file.read_bytes()


@pytest.mark.slow
def test_a_file_for_one_image_at_a_time(tmp_path):
    model = prompted("dualprompt")
    file = export_adapter(model, PROCESSOR, str(tmp_path / "model.onnx"), dynamic_batch=False, opset=20)
    torch.testing.assert_close(onnx_logits(file, images(1)), logits(model, images(1)), atol=1e-4, rtol=1e-3)
    assert onnxruntime.InferenceSession(file).get_inputs()[0].shape == [1, 3, 16, 16]


# ----------------------------------------------------------------------------------------------- torch.export


def test_a_file_of_torch(tmp_path):
    model = prompted("coda", tiny().bfloat16(), task_evidence=6.0)
    file = export_adapter(model.train(), PROCESSOR, tmp_path / "model", format="pt2")
    assert model.training
    model.eval()
    extra = {"peft_cl.json": ""}
    program = torch.export.load(file, extra_files=extra).module()
    batch = images(7).bfloat16()
    torch.testing.assert_close(program(batch), logits(model, batch), atol=1e-2, rtol=1e-2)
    assert json.loads(extra["peft_cl.json"])["classes"] == [f"class {row}" for row in range(6)]
    for place in (Path(peft_cl.__file__).parents[1], Path(torch.__file__).parent, tmp_path):  # no path of this machine
        assert str(place).encode() not in file.read_bytes()


def test_an_approximate_search_becomes_an_exact_one(tmp_path):
    model = prompted("l2p", search="faiss")
    file = export_adapter(model, PROCESSOR, tmp_path / "model.pt2")
    assert model.peft_config["default"].search == "faiss"
    exact = prompted("l2p")
    torch.testing.assert_close(torch.export.load(file).module()(images()), logits(exact), atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("file", "words", "error", "message"),
    [
        ("model.bin", {}, ValueError, r"'.*model.bin' does not end in .onnx or .pt2"),
        ("model", {}, ValueError, r"does not end in .onnx or .pt2.*torch.export"),
        ("model.onnx", {"format": "tflite"}, ValueError, r"format is 'tflite', but must be one of 'onnx', 'pt2'"),
        (
            "model.onnx",
            {"opset": 5},
            ValueError,
            r"opset is 5, but must be a whole number of at least 18.*Leave it out",
        ),
        ("model.pt2", {"opset": 20}, ValueError, r"opset is 20, .*of an ONNX file"),
        (".", {"format": "onnx"}, ValueError, r"is a folder. Name a file in it"),
        ("file/model.pt2", {}, OSError, "file"),
    ],
)
def test_what_is_refused(file, words, error, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("the work began"))
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=message):
        export_adapter(prompted("l2p"), PROCESSOR, tmp_path / file, **words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("the work began"))

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    if os.geteuid() == 0:  # whom no mode of a folder stops
        monkeypatch.setattr(Path, "touch", refuse)
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(PermissionError):
        export_adapter(prompted("l2p"), PROCESSOR, tmp_path / "model.pt2")
    tmp_path.chmod(stat.S_IRWXU)
    assert not list(tmp_path.iterdir())


def test_models_that_have_no_file(tmp_path):
    with pytest.raises(ValueError, match="has learnt no classes yet.*Train it first"):
        export_adapter(get_peft_model(tiny(), config("coda")), PROCESSOR, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="bfloat16, torch.float32, but an ONNX file.*dtype=torch.float32"):
        export_adapter(prompted("coda", tiny().bfloat16()), PROCESSOR, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(peft_cl.exporting, "MOST_ONNX", 1000)
    with pytest.raises(ValueError, match=r"an ONNX file has at most 2. Write a .pt2 file"):
        export_adapter(prompted("coda"), PROCESSOR, tmp_path / "model.onnx")


@pytest.mark.parametrize("missing", ["onnxscript", "onnxruntime"])
def test_the_extra_is_named(missing, tmp_path, monkeypatch):
    monkeypatch.setattr(peft_cl.exporting, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ImportError, match=rf"{missing} must be installed: `pip install \"peft-cl\[onnx\]\"`"):
        export_adapter(prompted("coda"), PROCESSOR, tmp_path / "model.onnx")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), None])
def test_a_file_that_is_not_the_model_is_never_there(error, tmp_path, monkeypatch):
    """An interruption, or a program whose logits differ, leaves the file of before."""
    (tmp_path / "model.pt2").write_text("before")

    class Wrong(nn.Module):
        def forward(self, pixel_values):
            if error is not None:
                raise error
            return torch.zeros(len(pixel_values), 6)

    monkeypatch.setitem(peft_cl.exporting.WRITERS, "pt2", lambda *_: Wrong())
    with pytest.raises(type(error) if error else ValueError, match=None if error else "differ from the model's by"):
        export_adapter(prompted("l2p"), PROCESSOR, tmp_path / "model.pt2")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


# ----------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_writes_onnx(place, trained, tmp_path, capsys):
    file = tmp_path / "an export" / "model.onnx"
    assert main(["export", str(trained), "--output", str(file)]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{file}: ") and "4 classes" in line and line.endswith("gives the logits of the model.")
    base = AutoModelForImageClassification.from_pretrained(place / "model")
    model = PeftModel.from_pretrained(base, str(trained)).eval()
    check(file, model)
    said = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == list(model.config.id2label.values())
    assert json.loads(said["preprocessing"])["size"] == dict(AutoImageProcessor.from_pretrained(trained).size)
    assert str(place).encode() not in file.read_bytes()


def test_the_command(place, trained, tmp_path, capsys):
    file = tmp_path / "model.pt2"
    assert main(["export", str(trained), "--output", str(file), "--fixed-batch"]) == 0
    ended = capsys.readouterr()
    assert ended.out.startswith(f"{file}: ") and "4 classes" in ended.out and "Warning" not in ended.err
    model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(place / "model"), trained).eval()
    torch.testing.assert_close(torch.export.load(file).module()(images(1)), logits(model, images(1)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "model.txt"], "'model.txt' does not end in .onnx or .pt2"),
        (["--output", "a/model.onnx", "--dtype", "bfloat16"], "in float32. Leave --dtype out, or write a .pt2 file"),
        (["--output", "a/model.onnx", "--opset", "3"], "opset is 3"),
    ],
)
def test_faults_of_the_command(words, message, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(trained), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("peft-cl: The adapter cannot be exported to") and message in line
    assert not list(tmp_path.iterdir())
