"""`peft-cl join`, `split` and `forget`: adapters on disk in, an adapter on disk out, written whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from cli_fixtures import COLOURS
from peft import PeftModel
from transformers import AutoModelForImageClassification

from peft_cl.cli import main


NAMES = list(COLOURS)


@pytest.fixture(scope="module")
def sources(place, tmp_path_factory) -> Path:
    """A folder with the adapters `low`, `high` (two classes each) and `whole`, nearest class means, learnt by the
    command; and `other`, with another head."""
    folder = tmp_path_factory.mktemp("sources")
    for name, classes, head in (
        ("low", NAMES[:2], "ncm"),
        ("high", NAMES[2:], "ncm"),
        ("whole", NAMES, "ncm"),
        ("other", NAMES[2:], "lda"),
    ):
        settings = {
            "method": "linear-probe",
            "preset": None,
            "adapter": {"head": head},
            "output_dir": str(folder / name),
            "scenario": {"num_tasks": 2, "class_order": classes},
            "model": {"name": str(place / "model")},
            "dataset": {"path": str(place / "data")},
            "training": {"use_cpu": True, "disable_tqdm": True, "pictures": False},
        }
        file = folder / f"{name}.json"
        file.write_text(json.dumps(settings))
        assert main(["train", str(file)]) == 0
    return folder


def logits(folder: Path, place: Path) -> tuple[list[str], torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(place / "model"), folder).eval()
    batch = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.peft_config["default"].classes, model(batch).logits


def test_join_makes_the_adapter_of_the_sequence(sources, place, tmp_path, capsys):
    out = tmp_path / "with a blank" / "joined"
    assert main(["join", str(sources / "low"), str(sources / "high"), "--output", str(out)]) == 0
    said = capsys.readouterr()
    assert "It knows 4 classes in 4 tasks" in said.out
    classes, found = logits(out, place)
    _, expected = logits(sources / "whole", place)
    assert classes == NAMES
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    files = {path.name for path in out.iterdir()}
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "head_sums.safetensors",
        "preprocessor_config.json",
        "README.md",
    }
    card = (out / "README.md").read_text()
    assert "Joined from low and high." in card and str(sources) not in card and str(tmp_path) not in card
    assert str(sources) not in (out / "adapter_config.json").read_text()
    assert main(["evaluate", str(out), "--dataset", str(place / "data")]) == 0
    assert "average accuracy" in capsys.readouterr().out


def test_split_and_forget_make_adapters_too(sources, place, tmp_path, capsys):
    assert main(["split", str(sources / "whole"), "--tasks", "task_1", "--output", str(tmp_path / "part")]) == 0
    classes, found = logits(tmp_path / "part", place)
    _, expected = logits(sources / "high", place)
    assert classes == NAMES[2:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    whole, gone = str(sources / "whole"), NAMES[1]
    assert main(["forget", whole, gone, "--output", str(tmp_path / "less")]) == 0
    classes, _ = logits(tmp_path / "less", place)
    assert classes == [name for name in NAMES if name != gone]
    written = b"".join(path.read_bytes() for path in (tmp_path / "less").iterdir())
    assert gone.encode() not in written
    assert gone in json.loads((sources / "whole" / "adapter_config.json").read_text())["classes"]  # as it was


def test_a_prompt_adapter_is_divided_by_the_names_of_its_tasks(trained, tmp_path):
    with pytest.warns(UserWarning, match="learnt with images of other tasks too"):
        assert main(["split", str(trained), "--tasks", "task_0", "--output", str(tmp_path / "part")]) == 0
    facts = json.loads((tmp_path / "part" / "adapter_config.json").read_text())
    assert len(facts["tasks"]) == 1 and facts["rows_in_use"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["join", "{low}"], "joining takes two or more"),
        (["join", "{low}", "{low}"], "An adapter is given twice"),
        (["join", "{low}", "./nothing"], "There is no adapter './nothing'"),
        (["join", "{low}", "{other}"], "cannot be joined: head is 'ncm' and 'lda'"),
        (["join", "{low}", "{coda}"], "the methods are Linear probe and CODA-Prompt"),
        (["join", "{low}", "{resized}"], "The image processors .* differ \\(size\\)"),
        (["join", "{low}", "{no sums}"], "needs them, but there is no head_sums.safetensors"),
        (["split", "{whole}", "--tasks", "task_7"], "There is no task task_7.*Known: task_0, task_1"),
        (["split", "{whole}", "--tasks", "task_0,task_0"], "must name one or more tasks, each once"),
        (["split", "{whole}", "--tasks", ","], "must name one or more tasks"),
        (["forget", "{whole}", "lion"], "There is no class lion"),
        (["forget", "{whole}", *NAMES], "All classes would be forgotten"),
        (["forget", "{other}", NAMES[2]], "by_class"),
    ],
)
def test_what_does_not_work_is_said_in_a_line_and_nothing_is_written(
    words, message, sources, trained, tmp_path, capsys
):
    places = {name: sources / name for name in ("low", "high", "whole", "other")} | {"coda": trained}
    for name in ("resized", "no sums"):
        places[name] = tmp_path / name
        shutil.copytree(sources / "high", places[name])
    settings = json.loads((tmp_path / "resized" / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 8, "width": 8}
    (tmp_path / "resized" / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "no sums" / "head_sums.safetensors").unlink()
    words = [word.format(**{name: str(path) for name, path in places.items()}) for word in words]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("peft-cl: ")
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_folder_with_something_in_it_is_refused_before_any_work(sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for output in ("full", "file"):
        for words in (
            ["join", str(sources / "low"), str(sources / "high")],
            ["split", str(sources / "whole"), "--tasks", "task_0"],
            ["forget", str(sources / "whole"), NAMES[0]],
        ):
            assert main([*words, "--output", str(tmp_path / output)]) == 2
            assert "is there already, and nothing is written over" in capsys.readouterr().err
    assert (tmp_path / "full" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_an_interruption_leaves_nothing(sources, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_cl.tuners.base.model.PromptPoolModel.save_sums", interrupted)
    assert main(["join", str(sources / "low"), str(sources / "high"), "--output", str(tmp_path / "out")]) == 130
    assert not list(tmp_path.iterdir())
