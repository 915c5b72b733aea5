"""Spaces: the metrics that `evaluate.load` takes from the Hub, and the page of an adapter."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import yaml
from hub_cases import TOKEN, Session
from hub_server import LoopbackHub

from peft_cl.cli import main
from peft_cl.hub.spaces import demo_files, metrics_files
from peft_cl.metrics import MODULE
from peft_cl.version import __version__


ROWS = {"predictions": [0, 0, 1], "references": [0, 0, 1], "task_ids": [0, 0, 1], "steps": [0, 1, 1]}


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub(tokens=(TOKEN,)) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    session = Session(hub, tmp_path_factory.mktemp("client") / "home")
    yield session
    session.close()


def facts_of(page: bytes) -> dict:
    """The first lines of a Space's README, which say how it is run."""
    return yaml.safe_load(page.decode().split("---\n")[1])


def test_the_metrics_are_pushed_and_loaded_by_name(hub, client):
    answer = client.command("push", "--metrics", "user")
    assert answer["value"] == 0, answer["errors"]
    assert "evaluate.load('user/continual_learning')" in answer["output"]
    (commit,) = hub.pushed("spaces/user/continual_learning")
    assert commit.files.keys() >= {"app.py", "README.md", "requirements.txt", "continual_learning.py"}
    measured = client("metric", "user/continual_learning", ROWS)
    assert measured["fault"] is None, measured["fault"]["traceback"]
    assert measured["value"]["average_accuracy"] == 1.0
    assert ("spaces/user/continual_learning", "continual_learning.py") in hub.downloads


def test_the_metrics_say_how_they_are_run():
    files = metrics_files("user/continual_learning")
    facts = facts_of(files["README.md"])
    assert facts["sdk"] == "gradio" and facts["app_file"] == "app.py" and facts["tags"] == ["evaluate", "metric"]
    assert files["requirements.txt"].decode() == f"peft-cl=={__version__}\n"


def test_the_app_of_the_metrics_measures_a_table(tmp_path, monkeypatch):
    """As the Space starts it: its files in one folder."""
    import gradio

    (tmp_path / "app.py").write_bytes(metrics_files("user/continual_learning")["app.py"])
    monkeypatch.syspath_prepend(MODULE)
    spec = importlib.util.spec_from_file_location("app_of_the_space", tmp_path / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    table = tmp_path / "table.csv"
    lines = [",".join(ROWS), *(",".join(map(str, row)) for row in zip(*ROWS.values(), strict=True))]
    table.write_text("\n".join(lines))
    assert app.measure(str(table))["average_accuracy"] == 1.0
    table.write_text("predictions,references\n1,1\n")
    with pytest.raises(gradio.Error, match="The table cannot be measured: 'task_ids'"):
        app.measure(str(table))
    sys.modules.pop("continual_learning", None)


def test_the_page_of_an_adapter_names_it_and_cannot_break_out_of_its_string():
    files = demo_files("user/coda-birds")
    assert 'make_page("user/coda-birds", read_only=True)' in files["app.py"].decode()
    compile(files["app.py"], "app.py", "exec")
    assert files["requirements.txt"].decode() == f"peft-cl[serve]=={__version__}\n"
    assert facts_of(files["README.md"])["models"] == ["user/coda-birds"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--metrics", "no/body"], "the Space of the metrics is 'no/body/continual_learning'"),
        (["--metrics", ""], "the Space of the metrics is '/continual_learning'"),
        (["out", "user/x", "--metrics", "user"], "--metrics pushes no adapter, so out has no place"),
        (["--metrics", "user", "--no-sums"], "--metrics pushes no adapter, so --no-sums has no place"),
        ([], "Give the folder of a run and a name on the Hub"),
        (["out"], "Give the folder of a run and a name on the Hub"),
        (["nowhere", "user/x"], "There is no folder 'nowhere'"),
        (["nowhere", "x"], "REPO is 'x', but must be a name on the Hub"),
        (["nowhere", "user/x", "--space", "x"], "--space is 'x', but must be a name on the Hub"),
    ],
)
def test_words_that_do_not_fit_are_refused_in_one_line(words, reason, capsys):
    assert main(["push", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("peft-cl: ") and reason in line
