"""Pushing an adapter and loading it by name: the real client over HTTP against a loopback server, in processes."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_cases import TOKEN, Session, environment, hub_with_base
from huggingface_hub import ModelCard
from PIL import Image

from peft_cl import RunResults


TINY = ("--training.num_train_epochs", "1")
OTHER_TOKEN = "hf_TokenGivenToTheCommand"


@pytest.fixture(scope="module")
def hub(place):
    with hub_with_base(place, TOKEN, OTHER_TOKEN) as hub:
        yield hub


@pytest.fixture(scope="module")
def here(hub, tmp_path_factory):
    """A process with the right to write."""
    session = Session(hub, tmp_path_factory.mktemp("here") / "home")
    yield session
    session.close()


@pytest.fixture(scope="module")
def elsewhere(hub, tmp_path_factory):
    """A process on another machine, with no right to write."""
    session = Session(hub, tmp_path_factory.mktemp("elsewhere") / "home", token=None)
    yield session
    session.close()


@pytest.fixture(scope="module")
def run(here, place, tmp_path_factory):
    """The folder of a run that learnt two of the four classes, on a backbone of the Hub."""
    folder = tmp_path_factory.mktemp("run") / "first run"
    classes = ("--scenario", "{num_tasks: 1, class_order: [red, green]}")
    words = ("--model.name", "user/base", "--output_dir", folder, *classes, *TINY)
    trained = here.command("train", place / "config.yaml", *words)
    assert trained["value"] == 0, trained["errors"]
    return folder


@pytest.fixture(scope="module")
def pushed(here, hub, run):
    answer = here.command("push", run, "user/first", "--message", "The first of all")
    assert answer["value"] == 0, answer["errors"]
    return {**answer, "commits": list(hub.pushed("user/first"))}


def telling(files: dict[str, bytes], *secrets: str) -> list[tuple[str, str]]:
    """Which of the secrets can be read in which file."""
    return [(path, secret) for path, content in files.items() for secret in secrets if secret.encode() in content]


def digest_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def digests_of(path: Path) -> set[str]:
    """The names that the cache may keep a file of this content under."""
    content = path.read_bytes()
    return {hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}


# --------------------------------------------------------------------------------------------------- what is pushed


def test_an_adapter_is_pushed_by_one_commit(pushed, hub):
    (commit,) = pushed["commits"]
    assert commit.title == "The first of all" and commit.token == TOKEN
    assert (
        commit.oid in pushed["output"] and 'pipeline("image-classification", model="user/first")' in pushed["output"]
    )
    assert {"adapter_model.safetensors", "adapter_config.json", "preprocessor_config.json"} < commit.files.keys()
    assert {"README.md", "results.json", "accuracy_matrix.png"} < commit.files.keys()


def test_nothing_else_of_the_folder_leaves_the_machine(pushed, run):
    here = {path.name for path in run.iterdir()}
    assert {"_state", "training_args.bin"} < here, "else this test says nothing"
    (commit,) = pushed["commits"]
    kinds = {Path(path).suffix for path in commit.files} | {str(Path(path).parent) for path in commit.files}
    assert kinds == {".", "", ".json", ".md", ".png", ".safetensors"}, sorted(commit.files)


def test_no_place_on_this_machine_and_no_token_is_shared(pushed, run, place):
    assert str(run) in (run / "results.json").read_text(), "else this test says nothing"
    (commit,) = pushed["commits"]
    assert not telling(commit.files, str(run.parent), str(place), TOKEN)
    record = json.loads(commit.files["results.json"])
    assert record["command"].startswith("peft-cl train config.yaml --model.name user/base --output_dir 'first run'")
    assert record["hyperparameters"]["data"]["path"] == "data"


def test_the_numbers_on_record_are_those_of_the_run(pushed, run, tmp_path):
    (tmp_path / "results.json").write_bytes(pushed["commits"][0].files["results.json"])
    shared, own = RunResults.load(tmp_path), RunResults.load(run)
    for name in (
        "accuracy_matrix",
        "metrics",
        "task_names",
        "train_seconds",
        "versions",
        "base_model",
        "finished_tasks",
    ):
        assert getattr(shared, name) == getattr(own, name)


def test_the_folder_is_as_it_was(here, hub, run):
    before = digest_of(run)
    assert here.command("push", run, "user/again")["value"] == 0
    assert digest_of(run) == before


def test_the_card_shows_the_matrix_and_the_name(pushed, elsewhere):
    text = pushed["commits"][0].files["README.md"].decode()
    assert "![The accuracy matrix as a picture](accuracy_matrix.png)" in text
    assert 'PeftModel.from_pretrained(base, "user/first")' in text
    assert ModelCard(text).data.base_model == "user/base"
    assert elsewhere("validate", text)["fault"] is None


def test_the_example_on_the_card_runs_as_printed(pushed, hub, tmp_path):
    text = pushed["commits"][0].files["README.md"].decode()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    Image.new("RGB", (80, 60), "red").save(tmp_path / "image.jpg")
    (tmp_path / "example.py").write_text(code)
    known = environment(hub, tmp_path / "home")
    ended = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=known, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() in ("red", "green")


# --------------------------------------------------------------------------------------------------- loading by name


def test_all_loaders_give_the_same_logits_to_the_bit(pushed, here, elsewhere, run):
    expected = here("ways", str(run), "user/base")["value"]
    found = elsewhere("ways", "user/first", "user/base")
    assert found["fault"] is None, found["fault"]
    assert found["value"]["labels"] == ["red", "green"]
    reference = expected["logits"]["PeftModel"]
    assert found["value"]["logits"] == dict.fromkeys(expected["logits"], reference)


def test_an_adapter_from_the_hub_learns_on_and_is_pushed_again(pushed, here, hub, place, tmp_path):
    classes = ("--scenario", "{num_tasks: 1, class_order: [blue, yellow]}")
    words = ("--continue-from", "user/first", "--model.name", "user/base", "--output_dir", tmp_path / "more")
    measured = ("--earlier_test", place / "data", "--preset", "null", "--adapter", "null")
    learnt = here.command("train", place / "config.yaml", *words, *classes, *measured, *TINY)
    assert learnt["value"] == 0, learnt["errors"]
    assert here.command("push", tmp_path / "more", "user/first", "--revision", "two-tasks")["value"] == 0
    before, after = hub.find("user/first", "main"), hub.find("user/first", "two-tasks")
    assert before == pushed["commits"][0], "main has changed"
    cards = [ModelCard(commit.files["README.md"].decode()) for commit in (before, after)]
    assert [card.data.eval_results[0].dataset_args["finished_tasks"] for card in cards] == [1, 2]
    assert json.loads(after.files["results.json"])["finished_tasks"] == 2
    assert "| task_1 |" in cards[1].text and "| task_1 |" not in cards[0].text
    labels = here("ways", str(tmp_path / "more"), "user/base")["value"]["labels"]
    assert labels == ["red", "green", "blue", "yellow"]


def test_a_backbone_that_was_trained_is_found_beside_its_adapter(here, elsewhere, hub, place, tmp_path):
    words = ("--method", "fine-tuning", "--preset", "null", "--adapter", "null", "--model.name", "user/base")
    trained = here.command("train", place / "config.yaml", *words, "--output_dir", tmp_path / "tuned", *TINY)
    assert trained["value"] == 0, trained["errors"]
    pushed = here.command("push", tmp_path / "tuned", "user/tuned")
    assert pushed["value"] == 0, pushed["errors"]
    expected, found = here("whole", str(tmp_path / "tuned")), elsewhere("whole", "user/tuned")
    assert found["fault"] is None, found["fault"]
    assert found["value"] == expected["value"]
    files = hub.find("user/tuned", None).files
    assert not telling(files, str(tmp_path), str(place))
    assert files["backbone/model.safetensors"] == files["model.safetensors"]


# --------------------------------------------------------------------------------------------------- ways to push


def test_a_pull_request_leaves_main_as_it_is(here, hub, run, pushed):
    answer = here.command("push", run, "user/first", "--pull-request")
    assert answer["output"].startswith("Nothing has changed, so there is no pull request: "), answer
    hub.add_commit("user/empty", "initial commit", TOKEN, {".gitattributes": b""})
    answer = here.command("push", run, "user/empty", "--pull-request")
    assert answer["output"] == f"Pull request: {hub.endpoint}/user/empty/discussions/1\n"
    assert hub.pushed("user/empty") == [] and len(hub.pushed("user/empty", "refs/pr/1")) == 1


def test_private_is_private_or_refused(here, elsewhere, hub, run, pushed):
    assert here.command("push", run, "user/secret", "--private", "--token", OTHER_TOKEN)["value"] == 0
    assert "user/secret" in hub.private and hub.pushed("user/secret")[0].token == OTHER_TOKEN
    assert elsewhere.command("info", "user/secret")["value"] == 2
    answer = here.command("push", run, "user/first", "--private")
    assert answer["value"] == 2 and "is there and public" in answer["errors"] and "--private" in answer["errors"]
    assert hub.pushed("user/first") == pushed["commits"]


def test_what_is_no_longer_there_is_removed_and_files_of_others_stay(here, hub, run, tmp_path):
    old = {"curves.png": b"old", "head_sums.safetensors": b"old", "results.json": b"{}"}
    hub.add_commit("user/older", "initial commit", TOKEN, {})
    hub.add_commit("user/older", "by hand", TOKEN, {**old, "mine.txt": b"mine", "model.safetensors": b"mine"})
    (tmp_path / "plain").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "plain" / name).write_bytes((run / name).read_bytes())
    answer = here.command("push", tmp_path / "plain", "user/older")
    assert answer["value"] == 0, answer["errors"]
    files = hub.pushed("user/older")[-1].files
    assert not set(old) & set(files) and files["mine.txt"] == files["model.safetensors"] == b"mine"
    # Without a record the card has no numbers, and the processor is the backbone's.
    card = ModelCard(files["README.md"].decode())
    assert "It knows 2 classes, learnt in 1 task." in card.text and card.data.base_model == "user/base"
    assert "preprocessor_config.json" in files and not card.data.eval_results


def test_the_page_on_sharing_runs(here, hub, run, place, tmp_path):
    """All its examples, in their order."""
    shutil.copytree(run, tmp_path / "out")
    Image.new("RGB", (80, 60), "red").save(tmp_path / "bird.jpg")
    config = yaml.safe_load((place / "config.yaml").read_text()) | {"model": {"name": "user/base"}}
    config["scenario"] = {"num_tasks": 1, "class_order": ["blue", "yellow"]}
    config["training"]["num_train_epochs"] = 1
    del config["preset"], config["adapter"]
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(config))
    page = (Path(__file__).parents[1] / "docs" / "sharing.md").read_text()
    blocks = re.findall(r"```(python|bash)\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) > 8
    for language, code in blocks:
        if language == "python":
            fault = here("execute", code, str(tmp_path))["fault"]
            assert fault is None, f"{code}\n{fault}"
        for line in code.splitlines() if language == "bash" else ():
            answer = here("command_in", str(tmp_path), *shlex.split(line)[1:])
            assert answer["value"] == 0, f"{line}\n{answer['errors']}"
    assert json.loads(hub.find("user/coda-birds", "main").files["results.json"])["finished_tasks"] == 2
    assert hub.pushed("spaces/user/birds") and hub.find("user/coda-birds", "tried")


# --------------------------------------------------------------------------------------------------- faults


COMMIT, LARGE_FILE = r"/commit/", r"/large/"
REFUSED = {
    "an unknown token": ("POST", "repos/create", 401, {}, "does not know the token", "--token"),
    "no right to write": ("POST", COMMIT, 403, {}, "may not do this (403)", "--token"),
    "another writer": ("POST", COMMIT, 409, {}, "at the same time (409)", "again"),
    "a commit in between": ("POST", COMMIT, 412, {}, "in between (412)", "again"),
    "too many requests": ("POST", COMMIT, 429, {"Retry_After": "7"}, "too many requests (429)", "Wait 7 s"),
    "a fault of the Hub": ("POST", COMMIT, 500, {}, "a fault of its own (500)", "again"),
    "an overloaded Hub": ("POST", COMMIT, 503, {}, "a fault of its own (503)", "again"),
    "a cut upload": ("POST", COMMIT, "cut", {}, "connection to the Hub broke", "not sent twice"),
    "a cut large file": ("PUT", LARGE_FILE, "cut", {}, "connection to the Hub broke", "not sent twice"),
    "a large file of another digest": ("PUT", LARGE_FILE, 400, {}, "refuses it (400)", "Correct"),
}


@pytest.mark.parametrize(
    "name",
    # Of large files the client itself tries again, for 23 seconds.
    [pytest.param(name, marks=[pytest.mark.slow] if name == "a cut large file" else []) for name in REFUSED],
)
def test_a_refusal_is_one_line_with_a_remedy_and_leaves_no_half(name, here, hub, run):
    method, pattern, kind, headers, reason, remedy = REFUSED[name]
    hub.large.clear()
    before, repo = digest_of(run), f"user/{name.replace(' ', '-')}"
    hub.fail(method, pattern, kind, 99, **headers)
    answer = here.command("push", run, repo, "--token", OTHER_TOKEN)
    hub.faults.clear()
    assert answer["value"] == 2 and not answer["output"], answer
    line = answer["errors"].strip().splitlines()[-1]
    assert line.startswith(f"peft-cl: The adapter is not pushed: '{repo}' cannot be pushed to: "), answer["errors"]
    assert reason in line and remedy in line, line
    assert "Traceback" not in answer["errors"]
    assert OTHER_TOKEN not in answer["errors"] and TOKEN not in answer["errors"]
    assert repo not in hub.repositories or not hub.pushed(repo), "there is half of it"
    assert digest_of(run) == before


@pytest.mark.parametrize("kind", [429, 503, "lost"])
def test_what_passes_is_tried_again_by_the_client(kind, here, hub, run):
    hub.fail("POST", "/preupload/", kind, **({"Retry_After": "0"} if kind == 429 else {}))
    answer = here.command("push", run, f"user/passes-{kind}")
    assert answer["value"] == 0, answer["errors"]
    assert len(hub.pushed(f"user/passes-{kind}")) == 1


def test_after_an_answer_that_was_lost_pushing_again_makes_no_second_commit(here, hub, run):
    hub.fail("POST", COMMIT, "lost")
    assert here.command("push", run, "user/lost")["value"] == 2
    assert here.command("push", run, "user/lost")["value"] == 0
    assert len(hub.pushed("user/lost")) == 1


def test_in_python_a_refusal_is_an_exception_with_its_status(here, hub, run):
    hub.fail("POST", COMMIT, 403)
    fault = here("push", str(run), "user/exception", {"token": OTHER_TOKEN})["fault"]
    assert fault["type"] == "HubError" and "by token=" in fault["message"]
    assert OTHER_TOKEN not in fault["traceback"]


BROKEN = {
    "no-such-name": ("GET", "/api/", 404, 1, "no such repository"),
    "not-allowed": ("GET", "/api/", 403, 1, "may not do this (403)"),
    "overloaded": ("GET", "/resolve/", 503, 99, "fault of its own (503)"),
    "silent": ("GET", "/resolve/.*model.safetensors", "lost", 99, "connection to the Hub broke"),
    "short": ("GET", "/resolve/.*model.safetensors", "short", 99, "a file came short"),
    "spoilt": ("GET", "/resolve/.*model.safetensors", "spoil", 99, "its digest is not the one"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_download_that_fails_keeps_no_part_of_a_file(name, elsewhere, hub, pushed):
    method, pattern, kind, times, reason = BROKEN[name]
    hub.add_commit(f"user/{name}", "a copy", TOKEN, pushed["commits"][0].files)
    hub.fail(method, f"user/{name}.*{pattern}" if pattern == "/api/" else pattern, kind, times)
    if pattern == "/api/":
        hub.faults[-1].pattern = re.compile(f"/api/models/user/{name}")
    answer = elsewhere.command("info", f"user/{name}")
    hub.faults.clear()
    assert answer["value"] == 2 and not answer["output"], answer
    line = answer["errors"].strip().splitlines()[-1]
    assert line.startswith(f"peft-cl: There is no folder 'user/{name}', and the Hub gives no adapter of that name: ")
    assert reason in line and "Traceback" not in answer["errors"], answer["errors"]
    assert not [path for path in elsewhere.home.rglob(f"*{name}/blobs/*") if path.name not in digests_of(path)]
    again = elsewhere.command("info", f"user/{name}")
    assert again["value"] == 0, again["errors"]


def test_a_download_that_is_cut_goes_on(elsewhere, hub, pushed):
    hub.add_commit("user/cut", "a copy", TOKEN, pushed["commits"][0].files)
    hub.fail("GET", "/resolve/.*model.safetensors", "cut", 2)
    assert elsewhere.command("info", "user/cut")["value"] == 0
    assert not [fault for fault in hub.faults if fault.times]


def test_the_stock_loader_refuses_a_file_that_was_damaged_on_its_way(elsewhere, hub, pushed):
    hub.add_commit("user/stock", "a copy", TOKEN, pushed["commits"][0].files)
    hub.fail("GET", "user/stock/resolve/.*adapter_model.safetensors", "spoil")
    fault = elsewhere("load", "user/stock", "user/base")["fault"]
    assert fault["type"] == "ValueError" and "load it again, and it is fetched anew" in fault["message"], fault
    assert elsewhere("load", "user/stock", "user/base")["fault"] is None


def test_the_imitation_knew_all_that_it_was_asked(hub, pushed):
    """What it does not know it refuses, and a client might go on in another way than with the Hub."""
    assert not hub.not_imitated, hub.not_imitated
