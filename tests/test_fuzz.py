"""Files that others made: some hundred variants of adapter, run, record, configuration and image, from seeds.

Each runs in a process of its own and is refused in words, handled rightly or harmless: none runs code that it brings,
touches a file outside its folder, takes 10 seconds, or 1 GB more than the good one. `SECURITY.md` says the limits.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from cli_fixtures import COLOURS, pictures
from fuzz_mutations import mutation
from fuzz_variants import KINDS
from peft import PeftModel
from transformers import AutoModelForImageClassification

from peft_cl import ContinualTrainer
from peft_cl.cli import main


MUTATIONS = 240
#: One in so many runs with the fast tests.
FAST = 14
SECONDS, KIBIBYTES, LETTERS = 10, 2**20, 30_000
#: What a reader of PEFT's or transformers' functions sees of a file that is refused.
REFUSALS = (ValueError, TypeError, KeyError, OSError, RuntimeError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Outcome:
    status: int
    text: str
    seconds: float
    kibibytes: int


@pytest.fixture(scope="session")
def good(trained, place, tmp_path_factory) -> Path:
    """A folder with a finished run, its configuration, its data as files, and a folder that is not to be touched."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(trained, folder / "run")
    shutil.copytree(place / "model", folder / "model")
    adapter = json.loads((folder / "run" / "adapter_config.json").read_text())
    examples = pictures(2, seed=3)
    for split in ("train", "test"):
        for index, row in enumerate(examples):
            place_of_image = folder / "data" / split / list(COLOURS)[row["label"]]
            place_of_image.mkdir(parents=True, exist_ok=True)
            row["image"].rotate(90 * (split == "test")).save(place_of_image / f"{index}.png")
    config = yaml.safe_load((place / "config.yaml").read_text())
    config["training"]["seed"] = 5
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "victim").mkdir()
    (folder / "victim" / "file").write_text("precious")
    assert adapter["classes"]
    return folder


@pytest.fixture
def variant(good, tmp_path):
    """A copy of the good folder, to damage."""
    shutil.copytree(good, tmp_path / "variant", symlinks=True)
    return tmp_path / "variant"


@pytest.fixture(scope="session")
def usual(good, tmp_path_factory) -> dict[str, Outcome]:
    """What each action gives and takes with the good files."""
    found = {}
    for action in ACTIONS:
        folder = tmp_path_factory.mktemp("usual") / "variant"
        shutil.copytree(good, folder)
        found[action] = outcome = in_a_process(action, folder)
        assert outcome.status == 0, (action, outcome)
    return found


def command(*words: str):
    return lambda folder: main([word.replace("DIR", str(folder)) for word in words])


def loaded_by_peft(folder: Path) -> int:
    base = AutoModelForImageClassification.from_pretrained(folder / "model")
    _ask(PeftModel.from_pretrained(base, folder / "run").eval())
    return 0


def loaded_by_transformers(folder: Path) -> int:
    # Its base model is named in the adapter; transformers' own refusal is part of what is tried.
    base = AutoModelForImageClassification.from_pretrained(folder / "model")
    base.load_adapter(str(folder / "run"))
    _ask(base.eval())
    return 0


def _ask(model: torch.nn.Module) -> None:
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 16, 16)).logits.isfinite().all()


ACTIONS = {
    "info": command("info", "DIR/run", "--json"),
    "evaluate": command("evaluate", "DIR/run", "--dataset", "DIR/data", "--json"),
    "plot": command("plot", "DIR/run"),
    "resume": command("train", "DIR/config.yaml", "--resume", "--output_dir", "DIR/run"),
    "train": command("train", "DIR/config.yaml", "--output_dir", "DIR/new"),
    "peft": loaded_by_peft,
    "bare": loaded_by_transformers,
}


def in_a_process(action: str, folder: Path) -> Outcome:
    """Fork, act in `folder`, and see how it ends; after three times the time it is killed."""
    output = folder / "output.txt"
    process = os.fork()
    if not process:
        os.setsid()
        status = 70
        try:
            os.chdir(folder)
            with open(output, "w", buffering=1, errors="backslashreplace") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                sys.stdout = sys.stderr = file
                status = _act(action, folder)
        finally:
            os._exit(status)
    deadline = time.monotonic() + 3 * SECONDS
    while time.monotonic() < deadline:
        found, status, usage = os.wait4(process, os.WNOHANG)
        if found:
            break
        time.sleep(0.02)
    else:
        os.kill(process, signal.SIGKILL)
        _, status, usage = os.wait4(process, 0)
    text = output.read_text(errors="replace") if output.exists() else ""
    return Outcome(os.waitstatus_to_exitcode(status), text, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)


def _act(action: str, folder: Path) -> int:
    if action == "train":  # what is tried is what is before training
        ContinualTrainer.train = lambda self, *args, **kwargs: os._exit(0)
    try:
        return ACTIONS[action](folder)
    except SystemExit as error:
        return error.code
    except REFUSALS as error:
        if action in ("peft", "bare"):
            print(error)
            return 2
        traceback.print_exc()
        return 71
    except BaseException:
        traceback.print_exc()
        return 72


def check(name: str, seed: int, make, folder: Path, usual: dict[str, Outcome]) -> None:
    action = make(random.Random(seed), folder / "run")
    outcome = in_a_process(action, folder)
    end = f"{name}, {action}: {outcome.status}, {outcome.seconds:.1f} s\n{outcome.text[-3000:]}"
    assert outcome.status in (0, 2), end
    # What is asked for as JSON is told whole, however long the names in it are.
    assert "Traceback" not in outcome.text and len(outcome.text) < (LETTERS if outcome.status else 10**6), end
    assert outcome.seconds < SECONDS and outcome.kibibytes < usual[action].kibibytes + KIBIBYTES, end
    assert not list(folder.rglob("MARK")), f"{name} ran code"
    assert [each.name for each in (folder / "victim").iterdir()] == ["file"], name
    assert (folder / "victim" / "file").read_text() == "precious", name
    if outcome.status == 2:
        assert outcome.text.strip(), f"{name} was refused without a word"
    elif action == "evaluate":
        answer = json.loads(outcome.text[outcome.text.index("{\n") :])
        assert 0 <= answer["accuracy"] <= 1, end


def few(items: list) -> list:
    """All items as parameters, most of them marked slow."""
    return [
        pytest.param(item, marks=() if index % FAST == 0 else pytest.mark.slow) for index, item in enumerate(items)
    ]


@pytest.mark.parametrize("kind", few(list(KINDS)))
def test_kinds(kind, variant, usual):
    check(kind, 0, KINDS[kind], variant, usual)


@pytest.mark.parametrize("number", few(list(range(MUTATIONS))))
def test_mutations(number, variant, usual):
    check(f"mutation {number}", number, mutation(number), variant, usual)


def test_there_are_as_many_as_promised():
    assert len(KINDS) + MUTATIONS >= 300


def test_a_fault_is_found(variant, usual, monkeypatch):
    """The checks can fail: an action that ends in a traceback, writes outside, or sleeps, is told of."""
    for act, message in (
        (lambda folder: 1 / 0, "72"),
        (lambda folder: (folder / "victim" / "file").write_text("new") and 0, "victim"),
        (lambda folder: (folder / "MARK").write_text("") or 0, "ran code"),
        (lambda folder: print("x" * 10**6) or 2, "xxx"),
        (lambda folder: bytearray(2**31) and 0, "0, "),
    ):
        monkeypatch.setitem(ACTIONS, "info", act)
        (variant / "MARK").unlink(missing_ok=True)
        (variant / "victim" / "file").write_text("precious")
        with pytest.raises(AssertionError, match=message if message != "victim" else None):
            check("it", 0, lambda rng, run: "info", variant, usual)
