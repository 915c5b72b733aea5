"""A sequence that is killed and resumed ends as if nothing had happened. Real processes, real SIGKILL."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from trainer_cases import CONFIGS
from transformers import TrainerCallback

from peft_cl.trainer.snapshot import FILE, PREVIOUS, load_snapshot, save_snapshot


PROCESS = Path(__file__).with_name("sequence_process.py")


def run(folder: Path, method: str, kill_at: int = 0, resume: bool = False) -> subprocess.CompletedProcess:
    words = [str(folder), method, str(kill_at), "resume" if resume else "anew"]
    return subprocess.run([sys.executable, str(PROCESS), *words], capture_output=True, text=True, timeout=300)


def outcome(folder: Path) -> tuple[dict, dict]:
    record = json.loads((folder / "results.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), record["accuracy_matrix"]


def same(folder: Path, expected: Path) -> bool:
    (weights, matrix), (expected_weights, expected_matrix) = outcome(folder), outcome(expected)
    same_weights = all(torch.equal(weights[name], tensor) for name, tensor in expected_weights.items())
    return matrix == expected_matrix and weights.keys() == expected_weights.keys() and same_weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(method)`: folder of a run that nothing interrupted, and the kinds of its moments, in order."""
    done = {}

    def get(method: str) -> tuple[Path, list[str]]:
        if method not in done:
            folder = tmp_path_factory.mktemp(method)
            process = run(folder, method)
            assert process.returncode == 0, process.stderr
            done[method] = folder, process.stdout.splitlines()[-2].split(", ")
        return done[method]

    return get


# Ten moments, each drawn at random among those of its kind.
KILLS = [
    ("l2p", "before a step"),
    ("l2p", "replace"),
    ("dualprompt", "between tasks"),
    ("coda", "evaluation"),
    ("coda+checkpoints", "in a step"),
    ("coda+checkpoints", "fsync"),
    ("l2p+checkpoints", "replace"),
    ("dualprompt+stream", "between tasks"),
    ("probe+finetuning+ewc+checkpoints", "evaluation"),
    ("l2p+er", "in a step"),
    ("probe+lda", "fsync"),
]
#: Heads that observe, under prompts.
MORE_KILLS = [
    ("coda+lda+drift+checkpoints", "in a step"),
    ("l2p+aligned+checkpoints", "evaluation"),
    ("dualprompt+fusion+stream", "between tasks"),
    ("coda+ridge+first+checkpoints", "before a step"),
    # Pools that grow.
    ("l2p+growing+checkpoints", "in a step"),
    ("coda+shared+adaptive+checkpoints", "evaluation"),
    ("dualprompt+bykey+adaptive", "between tasks"),
]


def test_a_run_is_killed_at_each_kind_of_moment(whole):
    _, moments = whole("coda+checkpoints")
    assert set(moments) == {kind for _, kind in KILLS}  # heads that observe have no moments of their own
    assert moments.count("between tasks") == 2 and moments.count("in a step") == moments.count("before a step") > 6
    # What is written within a task lies between its steps.
    steps = [place for place, kind in enumerate(moments) if kind == "in a step"]
    assert {"fsync", "replace"} <= set(moments[steps[0] : steps[2]])


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *KILLS[::4],
        *(pytest.param(*each, marks=pytest.mark.slow) for each in KILLS + MORE_KILLS if each not in KILLS[::4]),
    ],
)
def test_kill_and_resume_gives_the_same_bits(method, kind, whole, tmp_path):
    folder, moments = whole(method)
    places = [place for place, each in enumerate(moments, start=1) if each == kind]
    kill_at = random.Random(f"{method} {kind}").choice(places)
    killed = run(tmp_path, method, kill_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(tmp_path, method, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    assert same(tmp_path, folder), f"killed at moment {kill_at} of {len(moments)}, {kind}"


def test_a_task_goes_on_from_its_last_whole_checkpoint(whole, tmp_path):
    """The third of three tasks was interrupted; its checkpoint of step 6 is damaged, so that of step 4 is used."""
    folder, _ = whole("coda+checkpoints")
    shutil.copytree(folder, tmp_path / "run")
    state = tmp_path / "run" / "_state"
    os.replace(state / PREVIOUS, state / FILE)  # two of three tasks are finished
    with open(state / "task_2" / "checkpoint-6" / "optimizer.pt", "ab") as file:
        file.write(b"x")
    resumed = run(tmp_path / "run", "coda+checkpoints", resume=True)
    assert "checkpoint-6 is damaged (optimizer.pt), so the one before it is used" in resumed.stderr
    assert same(tmp_path / "run", folder)
    steps = json.loads((state / "task_2" / "checkpoint-6" / "trainer_state.json").read_text())["global_step"]
    assert steps == 6 and resumed.stdout.splitlines()[-3] == "training steps 2"


def test_nothing_is_left_after_the_last_step(whole, tmp_path):
    """Killed between the last step's checkpoint and the task's end, with `max_steps` inside an epoch."""
    folder, _ = whole("coda+checkpoints+short")
    shutil.copytree(folder, tmp_path / "run")
    state = tmp_path / "run" / "_state"
    os.replace(state / PREVIOUS, state / FILE)
    resumed = run(tmp_path / "run", "coda+checkpoints+short", resume=True)
    assert resumed.stdout.splitlines()[-3] == "training steps 0", resumed.stderr
    assert same(tmp_path / "run", folder)


@pytest.mark.parametrize("checkpoints", [1, 2])
def test_early_stopping_goes_on_as_it_was(checkpoints, whole, tmp_path):
    """Killed after the evaluation that stopped the task, and between that and the one before."""
    folder, _ = whole("probe+checkpoints+stopping")
    shutil.copytree(folder, tmp_path / "run")
    state = tmp_path / "run" / "_state"
    os.replace(state / PREVIOUS, state / FILE)
    kept = {int(each.name.split("-")[1]): each for each in (state / "task_2").glob("checkpoint-*")}
    assert set(kept) == {4, 6}  # of 12 steps
    if checkpoints == 1:
        shutil.rmtree(kept[6])
    resumed = run(tmp_path / "run", "probe+checkpoints+stopping", resume=True)
    assert resumed.stdout.splitlines()[-3] == f"training steps {2 if checkpoints == 1 else 0}", resumed.stderr
    assert same(tmp_path / "run", folder)


def test_a_full_disk_keeps_what_was_saved(whole, tmp_path):
    """The second task's snapshot is larger than a file may be: one error, one remedy, and nothing lost."""
    folder, _ = whole("coda")
    limit = (folder / "_state" / PREVIOUS).stat().st_size - 1000
    words = [sys.executable, str(PROCESS), str(tmp_path), "coda", "0", "anew"]
    environment = {**os.environ, "LARGEST_FILE": str(limit)}
    full = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)
    assert full.returncode == 1
    assert "File too large. The first 1 tasks are kept: make room on the disk, make model and trainer" in full.stderr
    assert load_snapshot(tmp_path / "_state")["finished_tasks"] == 1
    assert run(tmp_path, "coda", resume=True).returncode == 0
    assert same(tmp_path, folder)


def test_finished_tasks_are_not_repeated(whole, tmp_path):
    folder, _ = whole("coda")
    shutil.copytree(folder, tmp_path / "done")
    resumed = run(tmp_path / "done", "coda", resume=True)
    assert resumed.returncode == 0 and resumed.stdout.splitlines()[-2] == ""  # no moment


def test_other_settings_are_refused_with_their_difference(whole, tmp_path):
    folder, _ = whole("coda")
    shutil.copytree(folder, tmp_path / "done")
    resumed = run(tmp_path / "done", "dualprompt", resume=True)
    assert resumed.returncode == 1
    assert "other settings: method: was 'CODA-Prompt', is 'DualPrompt'; adapter." in resumed.stderr


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
    with pytest.raises(ValueError, match="sequence.previous.pt are damaged, so there is nothing to go on from"):
        load_snapshot(tmp_path)


def test_an_interrupted_run_is_not_trained_over(make_trainer):
    first = make_trainer(CONFIGS["linear-probe"](), num_train_epochs=1)
    first.train_task(first.scenario[0])
    with pytest.raises(
        ValueError, match=r"run was interrupted after 1 of 3 tasks. Call train\(resume_from_checkpoint"
    ):
        make_trainer(CONFIGS["linear-probe"](), num_train_epochs=1).train()
    with pytest.raises(ValueError, match="run was interrupted after 1 of 3 tasks"):
        loop = make_trainer(CONFIGS["linear-probe"](), num_train_epochs=1)
        loop.train_task(loop.scenario[0])
    resumed = make_trainer(CONFIGS["linear-probe"](), num_train_epochs=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.finished_tasks == 3
    make_trainer(CONFIGS["linear-probe"](), num_train_epochs=1).train()  # of a finished run nothing is lost


def test_a_run_that_was_interrupted_in_its_first_task_is_not_trained_over(make_trainer):
    """There is no snapshot yet, but a checkpoint."""

    class Interrupt(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    settings = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 1}
    with pytest.raises(KeyboardInterrupt):
        first = make_trainer(CONFIGS["linear-probe"](), callbacks=[Interrupt()], **settings)
        first.train()
    with pytest.raises(ValueError, match="run was interrupted after 0 of 3 tasks"):
        make_trainer(CONFIGS["linear-probe"](), **settings).train()
    resumed = make_trainer(CONFIGS["linear-probe"](), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.finished_tasks == 3


def test_without_a_snapshot_there_is_nothing_to_load(tmp_path):
    assert load_snapshot(tmp_path) is None


def test_an_adapter_that_was_half_renamed_is_completed(make_trainer, tiny_vit, tmp_path, monkeypatch):
    """Killed when the configuration of two tasks is in its place, and the weights there are those of one."""
    first = make_trainer(CONFIGS["coda"](), num_train_epochs=1)
    first.train_task(first.scenario[0])
    replace = os.replace

    def killed(source, target):
        if Path(target) == tmp_path / "run" / "adapter_model.safetensors":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        first.train_task(first.scenario[1])
    monkeypatch.undo()
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(tiny_vit(), tmp_path / "run")
    make_trainer(CONFIGS["coda"](), num_train_epochs=1).resume(tmp_path / "run")
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "run")
    assert list(loaded.config.id2label.values()) == list(first.model.peft_config["default"].classes)
    assert torch.equal(loaded.base_model.pool.keys, first.tuner.pool.keys)
    assert not (tmp_path / "run" / ".saved").exists()
