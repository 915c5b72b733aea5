"""A sequence that is killed and resumed ends as if nothing had happened. Real processes, real SIGKILL."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_cl.trainer.snapshot import FILE, PREVIOUS, load_snapshot, save_snapshot


PROCESS = Path(__file__).with_name("sequence_process.py")


def run(folder: Path, method: str, kill_at: int = 0, resume: bool = False) -> subprocess.CompletedProcess:
    words = [str(folder), method, str(kill_at), "resume" if resume else "anew"]
    return subprocess.run([sys.executable, str(PROCESS), *words], capture_output=True, text=True, timeout=300)


def outcome(folder: Path) -> tuple[dict, dict]:
    record = json.loads((folder / "results.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), record["accuracy_matrix"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(method)`: folder and number of events of a run that nothing interrupted."""
    done = {}

    def get(method: str) -> tuple[Path, int]:
        if method not in done:
            folder = tmp_path_factory.mktemp(method)
            process = run(folder, method)
            assert process.returncode == 0, process.stderr
            done[method] = folder, int(process.stdout.splitlines()[-2])
        return done[method]

    return get


@pytest.mark.parametrize("method", ["l2p", "dualprompt", "coda"])
def test_kill_and_resume_gives_the_same_bits(method, whole, tmp_path):
    folder, events = whole(method)
    kill_at = random.Random(method).randint(1, events)
    killed = run(tmp_path, method, kill_at)
    assert killed.returncode == -signal.SIGKILL
    resumed = run(tmp_path, method, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    (weights, matrix), (expected_weights, expected_matrix) = outcome(tmp_path), outcome(folder)
    assert matrix == expected_matrix
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected_weights[name]), f"{name}, killed at event {kill_at} of {events}"


def test_finished_tasks_are_not_repeated(whole, tmp_path):
    folder, events = whole("coda")
    shutil.copytree(folder, tmp_path / "done")
    resumed = run(tmp_path / "done", "coda", resume=True)
    assert resumed.returncode == 0 and int(resumed.stdout.splitlines()[-2]) == 0


def test_other_settings_are_refused_with_their_difference(whole, tmp_path):
    folder, _ = whole("coda")
    shutil.copytree(folder, tmp_path / "done")
    resumed = run(tmp_path / "done", "dualprompt", resume=True)
    assert resumed.returncode == 1
    assert "cannot be resumed with other settings: adapter." in resumed.stderr


def test_a_damaged_snapshot_gives_way_to_the_one_before(tmp_path):
    for task in range(2):
        save_snapshot(tmp_path, {"task": task, "weights": {"keys": torch.full((3,), float(task))}})
    assert load_snapshot(tmp_path)["task"] == 1
    content = bytearray((tmp_path / FILE).read_bytes())
    content[-200] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.warns(UserWarning, match="sequence.pt is damaged; sequence.previous.pt, one task before it, is used"):
        state = load_snapshot(tmp_path)
    assert state["task"] == 0 and torch.equal(state["weights"]["keys"], torch.zeros(3))
    (tmp_path / PREVIOUS).write_bytes(b"")
    with pytest.raises(ValueError, match="are damaged, so there is nothing to go on from"):
        load_snapshot(tmp_path)


def test_without_a_snapshot_there_is_nothing_to_load(tmp_path):
    assert load_snapshot(tmp_path) is None
