"""Sharing adapters and runs on the Hub, and loading them from there: the real client against a loopback server.

Two real processes, since huggingface_hub reads its settings on import: one shares, and one that has neither its cache
nor its token loads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_cases import environment, hub_with_base
from hub_process import CLASSES
from hub_server import Commit, LoopbackHub
from huggingface_hub import ModelCard

from peft_cl.metrics import RunResults, results_table


PROCESS = Path(__file__).with_name("hub_process.py")
RUNS = ("user/run", "user/automatic", "user/cli")
#: The user's own in the environment, and one that is given to a run; odd enough to be found wherever they lie.
OWN_TOKEN, GIVEN_TOKEN = "hf_TokenOfTheEnvironment", "hf_TokenGivenToTheRun"


def client(hub: LoopbackHub, home: Path, *words: object, token: str | None = None) -> dict:
    """Run the process against `hub`; what it prints."""
    known = environment(hub, home, token)
    words = [sys.executable, str(PROCESS), *map(str, words)]
    process = subprocess.run(words, capture_output=True, text=True, timeout=300, env=known)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub(place):
    with hub_with_base(place, OWN_TOKEN, GIVEN_TOKEN) as hub:
        yield hub


@pytest.fixture(scope="module")
def shared(hub, place, tmp_path_factory):
    """What the sharing process saw; `hub` then has its repositories."""
    folder = tmp_path_factory.mktemp("share")
    seen = client(hub, folder / "home", "share", place, folder, GIVEN_TOKEN, token=OWN_TOKEN)
    return {**seen, "folder": folder}


@pytest.fixture(scope="module")
def loaded(hub, shared, place, tmp_path_factory):
    """What a process elsewhere saw."""
    folder = tmp_path_factory.mktemp("load")
    return {**client(hub, folder / "home", "load", place, folder / "refused", "hf_Wrong"), "folder": folder}


def record(commit: Commit, folder: Path) -> RunResults:
    (folder / "results.json").write_bytes(commit.files["results.json"])
    return RunResults.load(folder)


def test_an_adapter_from_the_hub_predicts_the_same(hub, shared, loaded):
    assert loaded["adapter"]["logits"] == shared["adapter"]["logits"]
    assert loaded["adapter"]["classes"] == shared["adapter"]["classes"] == CLASSES
    assert ("user/adapter", "adapter_model.safetensors") in hub.downloads, hub.downloads


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_pushed_once_and_whole(name, hub, shared, tmp_path):
    """Also by a Trainer that is told to push each checkpoint: what is shared is what was learnt in the end."""
    titles = [commit.title for commit in hub.pushed(name)]
    assert titles == ["End of training"], f"pushed to {name}: {titles}"
    results = record(hub.pushed(name)[0], tmp_path)
    assert results.finished_tasks == 2, f"{name} was pushed after {results.finished_tasks} of 2 tasks"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_adapter_card_results_and_processor_on_the_hub(name, hub, shared):
    files = hub.pushed(name)[-1].files.keys()
    needed = {"adapter_model.safetensors", "adapter_config.json", "README.md", "results.json"}
    missing = (needed | {"preprocessor_config.json"}) - files
    assert not missing, f"{name} has {sorted(files)}"


@pytest.mark.parametrize("name", RUNS)
def test_snapshots_and_checkpoints_stay_at_home(name, hub, shared):
    files = hub.pushed(name)[-1].files
    private = [path for path in files if path.startswith(("_", ".saving")) or "checkpoint" in path or ".pt" in path]
    assert not private, f"{private} are on the Hub"


def test_there_is_a_state_at_home(shared):
    """Else the test before would pass for nothing."""
    for name in RUNS:
        state = shared["folder"] / name.removeprefix("user/") / "_state"
        assert list(state.glob("*.pt")) and list(state.rglob("checkpoint-*")), f"{state} holds no state"


@pytest.mark.parametrize("name", RUNS)
def test_the_card_on_the_hub_is_ours_and_says_what_was_measured(name, hub, shared, tmp_path):
    """Not the Trainer's card, nor PEFT's, which either writes on its way."""
    commit = hub.pushed(name)[-1]
    text, results = commit.files["README.md"].decode(), record(commit, tmp_path)
    assert results_table([results]) in text and "### Accuracy matrix" in text, text
    assert "generated_from_trainer" not in text and "More Information Needed" not in text, text
    data = ModelCard(text).data
    assert data.library_name == "peft" and "continual-learning" in data.tags
    measured = {result.metric_type: result.metric_value for result in data.eval_results}
    assert measured["accuracy"] == pytest.approx(results.metrics["average_accuracy"], abs=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_the_card_on_the_hub_shows_how_to_load_the_adapter_from_there(name, hub, shared):
    text = hub.pushed(name)[-1].files["README.md"].decode()
    assert f'PeftModel.from_pretrained(base, "{name}")' in text, text[text.find("## How to use") :][:900]


def test_the_command_pushes_its_pictures_and_names_itself(hub, shared):
    assert shared["train"]["status"] == 0, shared["train"]["errors"]
    files = hub.pushed("user/cli")[-1].files
    assert "accuracy_matrix.png" in files, f"user/cli has {sorted(files)}"
    assert "`peft-cl train " in files["README.md"].decode()
    assert json.loads(files["results.json"])["command"].startswith("peft-cl train ")


def test_the_token_given_to_a_run_is_the_one_that_pushes(hub, shared):
    tokens = {name: commits[-1].token for name, commits in hub.repositories.items()}
    own, given = ("user/adapter", "user/automatic"), ("user/run", "user/cli")
    assert tokens == dict.fromkeys(("user/base", *own), OWN_TOKEN) | dict.fromkeys(given, GIVEN_TOKEN)


@pytest.mark.parametrize("name", ["user/adapter", *RUNS])
def test_no_token_is_shared(name, hub, shared):
    """Whoever reads a repository must not be able to write it."""
    files = hub.pushed(name)[-1].files
    tokens = (OWN_TOKEN.encode(), GIVEN_TOKEN.encode())
    telling = [path for path, content in files.items() if any(token in content for token in tokens)]
    assert not telling, f"the token can be read in {telling} of {name}"


@pytest.mark.parametrize("name", RUNS)
def test_no_place_on_this_machine_is_shared(name, hub, shared, place):
    """The adapters of two runs are on a backbone in a folder, whose name alone is told."""
    files = hub.pushed(name)[-1].files
    places = (str(place).encode(), str(shared["folder"]).encode())
    assert not [path for path, content in files.items() if any(each in content for each in places)]
    base = json.loads(files["adapter_config.json"])["base_model_name_or_path"]
    assert base == ("user/base" if name == "user/cli" else "path/to/model")


def test_info_reads_an_adapter_on_the_hub(loaded):
    assert loaded["info"]["status"] == 0, loaded["info"]["errors"]
    facts = json.loads(loaded["info"]["output"])
    assert facts["method"] == "CODA-Prompt" and len(facts["tasks"]) == 2
    assert facts["results"]["finished_tasks"] == 2


def test_evaluate_measures_an_adapter_on_the_hub(hub, loaded, tmp_path):
    """The number is the one that the run measured, from the files on the Hub alone."""
    assert loaded["evaluate"]["status"] == 0, loaded["evaluate"]["errors"]
    measured = json.loads(loaded["evaluate"]["output"])
    results = record(hub.pushed("user/cli")[-1], tmp_path)
    assert measured["average_accuracy"] == pytest.approx(results.metrics["average_accuracy"])
    assert ("user/cli", "accuracy_matrix.png") not in hub.downloads, "fetched what is not needed"


def test_a_name_that_the_hub_does_not_have_is_refused_in_one_line(loaded):
    assert loaded["missing"]["status"] == 2 and not loaded["missing"]["output"]
    (line,) = loaded["missing"]["errors"].strip().splitlines()
    assert "'user/nothing'" in line and "the Hub gives no adapter of that name" in line, line


def test_a_token_that_may_not_write_is_refused_before_anything_is_trained(hub, loaded):
    assert loaded["refused"]["status"] == 2, loaded["refused"]["output"]
    assert "This run cannot be set up: " in loaded["refused"]["errors"] and "401" in loaded["refused"]["errors"]
    assert not (loaded["folder"] / "refused" / "results.json").exists() and "user/refused" not in hub.repositories


def test_the_imitation_knew_all_that_it_was_asked(hub, shared, loaded):
    """What it does not know it refuses, and a client might go on in another way than with the Hub."""
    assert not hub.not_imitated, hub.not_imitated
