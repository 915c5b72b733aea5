"""`peft-cl plot` draws what is on disk, and says what it cannot draw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from peft_cl.cli import main
from peft_cl.commands.plot import tell_apart
from peft_cl.metrics import RunResults, continual_metrics
from peft_cl.plots.run import PICTURE_FILES, read_rows
from peft_cl.reliability import fit_calibration


MATRIX = [[0.8, np.nan, np.nan], [0.9, 0.6, np.nan], [0.5, 0.4, 0.7]]
ALWAYS = {"accuracy_matrix.png", "curves.png"}


def results(method: str = "L2P", seed: int = 0, finished: int = 3, **fields) -> RunResults:
    matrix = np.where(np.arange(3)[:, None] < finished, MATRIX, np.nan)
    defaults = {
        "peft_type": "L2P",
        "base_model": "owner/backbone",
        "dataset": "owner/images",
        "scenario": {},
        "task_names": ["task_0", "task_1", "task_2"],
        "test_sizes": [50] * 3,
        "accuracy_matrix": matrix,
        "metrics": continual_metrics(matrix) if finished else {},
        "trainable_parameters": 1,
        "total_parameters": 2,
        "adapter_bytes": None,
        "train_seconds": 1.0,
        "finished_tasks": finished,
    }
    return RunResults(method=method, seed=seed, **{**defaults, **fields})


def save_adapter(folder: Path, layers: list[int] | None = None, **keys: torch.Tensor) -> None:
    """Write an adapter with these tensors in its pool, and with a general prompt and a head, which are not read."""
    tensors = {f"base_model.model.vit.coda_pool.{name}": tensor for name, tensor in keys.items()}
    others = ("vit.coda_pool.g_prompts", "classifier.coda_head.weight")
    save_file(
        tensors | {f"base_model.model.{name}": torch.ones(2) for name in others}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"layers": layers}))


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run with counts, a temperature, and an adapter of two key sets, with 2 rows for each of 3
    tasks."""
    folder = tmp_path / "run"
    calibration = fit_calibration([[2.0, 0.0]] * 6, [0, 0, 0, 1, 1, 1]).to_dict()
    results(prompt_usage=[[3, 1], [1, 3], [2, 2]], calibration=[None, None, calibration]).save(_made(folder))
    keys = {"keys": torch.full((2, 2, 4), 5.0), "past_keys": torch.arange(32.0).reshape(2, 4, 4)}
    prompts = {"prompts": torch.full((2, 2, 2, 3, 4), 5.0), "past_prompts": torch.arange(192.0).reshape(2, 2, 4, 3, 4)}
    save_adapter(folder, [1, 3], **keys, **prompts)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def pictures(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.png")}


def test_one_run_is_drawn_into_its_folder(run, capsys):
    assert main(["plot", str(run)]) == 0
    assert pictures(run) == set(PICTURE_FILES)
    assert capsys.readouterr().out.split() == [str(run / name) for name in PICTURE_FILES]
    for name in PICTURE_FILES:
        assert min(Image.open(run / name).size) > 600


def test_keys_of_past_tasks_come_first(run):
    keys = read_rows(run)
    assert keys.values.shape == (2, 6, 4)
    np.testing.assert_array_equal(keys.values[:, :4].ravel(), np.arange(32))
    assert (keys.values[:, 4:] == 5).all()
    assert keys.rows_of_tasks == [2, 2, 2] and keys.set_names == ["layer 1", "layer 3"]


def test_a_prompt_is_one_vector_of_its_keys_and_values(run):
    prompts = read_rows(run, "prompts")
    assert prompts.values.shape == (2, 6, 24) and prompts.rows_of_tasks == [2, 2, 2]
    past = np.arange(192.0).reshape(2, 2, 4, 3, 4)
    for layer in range(2):
        for row in range(4):
            np.testing.assert_array_equal(prompts.values[layer, row], past[layer, :, row].ravel())


def test_rows_that_grew_belong_to_no_task(tmp_path):
    save_adapter(tmp_path, [0], keys=torch.ones(1, 2, 4), past_keys=torch.ones(1, 4, 4))
    assert read_rows(tmp_path).rows_of_tasks == [2, 2, 2]
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "grown": [2]}))
    assert read_rows(tmp_path).rows_of_tasks is None


def test_rows_of_a_pool_without_past_rows_belong_to_no_task(tmp_path):
    save_adapter(tmp_path, [0, 2, 4], keys=torch.ones(1, 5, 4, dtype=torch.bfloat16))
    keys = read_rows(tmp_path)
    assert keys.values.shape == (1, 5, 4) and keys.values.dtype == np.float32
    assert keys.rows_of_tasks is None and keys.set_names == ["set 0"]  # shared by the three layers


def test_keys_of_an_adapter_with_a_name_are_in_a_folder_of_that_name(tmp_path):
    save_adapter(_made(tmp_path / "birds"), [0], keys=torch.ones(1, 5, 4))
    assert read_rows(tmp_path).values.shape == (1, 5, 4)


def test_only_what_the_run_has_is_drawn(tmp_path):
    results(finished=1).save(tmp_path)
    assert main(["plot", str(tmp_path)]) == 0
    assert pictures(tmp_path) == ALWAYS
    save_adapter(tmp_path)  # a linear probe's has a head, but no keys
    assert main(["plot", str(tmp_path)]) == 0
    assert pictures(tmp_path) == ALWAYS


def test_output_takes_the_pictures_in_place_of_the_run(run, tmp_path):
    assert main(["plot", str(run), "--output", str(tmp_path / "new" / "pictures")]) == 0
    assert pictures(run) == set() and pictures(tmp_path / "new" / "pictures") == set(PICTURE_FILES)


def test_several_runs_are_drawn_side_by_side_in_the_current_folder(run, tmp_path, capsys, monkeypatch):
    results("DualPrompt").save(_made(tmp_path / "other"))
    monkeypatch.chdir(_made(tmp_path / "here"))
    assert main(["plot", str(run), "../other"]) == 0
    assert capsys.readouterr().out.split() == ["comparison.png", "comparison_curves.png"]
    assert pictures(Path()) == {"comparison.png", "comparison_curves.png"}
    assert pictures(run) == pictures(tmp_path / "other") == set()


def test_settings_of_one_method_are_named_by_their_folders_and_seeds_are_not():
    runs = [results(seed=0), results(seed=1), results("DualPrompt")]
    assert tell_apart([Path("a"), Path("b"), Path("c")], runs) == runs
    runs = [results(), results(), results("DualPrompt"), results(dataset="owner/others")]
    folders = [Path("out/slow"), Path("out/fast"), Path("out/dual"), Path("out/others")]
    named = [run.method for run in tell_apart(folders, runs)]
    assert named == ["L2P (slow)", "L2P (fast)", "DualPrompt", "L2P"]
    runs[1] = results(hyperparameters={"learning_rate": 0.5})  # told apart by what differs
    assert [run.method for run in tell_apart(folders, runs)] == ["L2P", "L2P", "DualPrompt", "L2P"]
    runs[1] = results()
    named = [run.method for run in tell_apart([Path("slow/run"), Path("fast/run")], runs[:2])]
    assert named == ["L2P (slow/run)", "L2P (fast/run)"]


@pytest.mark.parametrize(
    ("prepare", "words", "expected"),
    [
        (None, ["missing"], ["'missing'", "no such folder"]),
        (lambda folder: (folder / "file").touch(), ["file"], ["'file'", "that is a file"]),
        (
            lambda folder: (folder / "empty").mkdir(),
            ["empty"],
            ["'empty' has no results.json", "output folder of a run"],
        ),
        (
            lambda folder: results(finished=0).save(_made(folder / "new")),
            ["new"],
            ["none of its 3 tasks", "first task"],
        ),
        (lambda folder: (folder / "run" / "results.json").write_text("{"), ["run"], ["'run'", "damaged"]),
        (
            lambda folder: results(accuracy_matrix=[[80.0, 0, 0]] * 3).save(folder / "run"),
            ["run"],
            ["'run'", "divide percentages by 100"],
        ),
        (
            lambda folder: (folder / "run" / "adapter_model.safetensors").write_bytes(b"\x10" + b"\x00" * 9),
            ["run"],
            ["keys of the adapter in 'run' cannot be read"],
        ),
        (lambda folder: (folder / "run" / "adapter_config.json").write_text("{"), ["run"], ["keys of the adapter"]),
        (None, ["run", "../{name}/run"], ["run'", "more than once"]),
        (None, ["run", "--output", "run/results.json"], ["cannot be written to 'run/results.json'", "--output"]),
        (None, ["run", "--output", "run/results.json/in"], ["cannot be written", "--output"]),
    ],
)
def test_what_cannot_be_drawn_is_said(run, tmp_path, capsys, monkeypatch, prepare, words, expected):
    monkeypatch.chdir(tmp_path)
    if prepare:
        prepare(tmp_path)
    assert main(["plot", *(word.format(name=tmp_path.name) for word in words)]) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert message.startswith("peft-cl: ") and all(part in message for part in expected), message
    assert not list(tmp_path.rglob("*.png"))


def test_a_picture_that_cannot_be_written_is_said(run, capsys):
    (run / "curves.png").mkdir()
    assert main(["plot", str(run)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_without_matplotlib_the_error_says_what_to_install(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(run)]) == 2
    assert "pip install peft-cl[plots]" in capsys.readouterr().err


def test_intransigence_is_told_against_a_joint_run(run, tmp_path, capsys):
    joint = [[0.9, np.nan, np.nan], [0.9, 0.8, np.nan], [0.9, 0.9, 0.9]]
    results("L2P + joint training", accuracy_matrix=joint).save(_made(tmp_path / "joint"))
    assert main(["plot", str(run), "--reference", str(tmp_path / "joint")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{run}: intransigence 16.67%"
    results("L2P", accuracy_matrix=joint).save(_made(tmp_path / "other"))
    assert main(["plot", str(run), "--reference", str(tmp_path / "other")]) == 0
    assert "was learnt by L2P, and not by joint training" in capsys.readouterr().out.splitlines()[-1]
    results("joint", test_sizes=[5] * 3).save(tmp_path / "joint")
    assert main(["plot", str(run), "--reference", str(tmp_path / "joint"), "--output", str(tmp_path / "new")]) == 2
    assert "differs from the run in test_sizes" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_what_was_measured_ahead_does_not_disturb_pictures(run):
    measured = np.where(np.isnan(MATRIX), 0.25, MATRIX)
    metrics = continual_metrics(measured, baseline=[0.5, 0.25, 0.125])
    results(accuracy_matrix=measured, metrics=metrics, baseline=[0.5, 0.25, 0.125]).save(run)
    assert main(["plot", str(run)]) == 0
