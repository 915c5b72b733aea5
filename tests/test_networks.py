"""Adapters that hold a network for each task: the command measures and predicts with the one in question."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from cli_fixtures import pictures, place  # noqa: F401

from peft_cl import RunResults
from peft_cl.cli import main


@pytest.fixture(scope="module", params=["packnet", "hat"])
def folder(request, place, tmp_path_factory):  # noqa: F811
    """A run of three tasks of which an earlier one's network is not the newest one's."""
    config = yaml.safe_load((place / "config.yaml").read_text())
    for name in ("preset", "adapter"):
        config.pop(name)
    folder = tmp_path_factory.mktemp(request.param) / "run"
    config |= {"method": "fine-tuning", "adapter": {"train_mask": True}, "strategy": request.param}
    config |= {"scenario": {"kind": "task-incremental", "num_tasks": 2}, "output_dir": str(folder)}
    config["training"] |= {"learning_rate": 5e-3, "num_train_epochs": 3, "pictures": False}
    path = folder.parent / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["train", str(path)]) == 0
    return folder


def test_it_is_measured_as_the_run_was(folder, place, capsys):  # noqa: F811
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--dataset", str(place / "data"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    results = RunResults.load(folder)
    np.testing.assert_allclose(list(found["tasks"].values()), results.accuracy_matrix[-1])


def test_without_its_record_the_tasks_are_not_known(folder, place, tmp_path, capsys):  # noqa: F811
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "results.json").unlink()
    assert main(["evaluate", str(tmp_path / "copy"), "--dataset", str(place / "data")]) == 2
    assert "holds a network for each task, but the record beside it" in capsys.readouterr().err


def test_the_task_of_images_is_said(folder, tmp_path, capsys):
    image = pictures(1, 0)[0]["image"]
    image.save(tmp_path / "image.png")
    assert main(["predict", str(folder), str(tmp_path / "image.png")]) == 2
    assert "Say which one the images belong to: --task, one of task_0, task_1." in capsys.readouterr().err
    assert main(["predict", str(folder), str(tmp_path / "image.png"), "--task", "task_2"]) == 2
    assert "There is no task task_2. Did you mean" in capsys.readouterr().err
    classes = RunResults.load(folder).scenario["class_order"]
    for task in (0, 1):
        assert main(["predict", str(folder), str(tmp_path / "image.png"), "--task", f"task_{task}"]) == 0
        lines = capsys.readouterr().out.strip().splitlines()
        assert {line.split()[-1] for line in lines[1:]} == set(classes[2 * task : 2 * task + 2])
