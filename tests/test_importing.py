"""`--import`: strategies of the user's own by name in configurations and suites."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import yaml
from cli_fixtures import EXAMPLES, place  # noqa: F401

from peft_cl import RunResults, Strategy, register_strategy
from peft_cl.cli import main
from peft_cl.commands import importing
from peft_cl.trainer.strategy import STRATEGIES


MINE = """
from peft_cl import Strategy, register_strategy

@register_strategy("of-mine")
class OfMine(Strategy):
    name = "Mine"

    def __init__(self, strength: float = 1.0):
        self.strength = strength

    def settings(self):
        return {"strength": self.strength}

    def losses(self, trainer, inputs, logits):
        return {"mine": self.strength * logits.square().mean()}
"""


@pytest.fixture(autouse=True)
def only_ours():
    """What a test registers is gone after it."""
    known = dict(STRATEGIES)
    yield
    STRATEGIES.clear()
    STRATEGIES.update(known)
    importing.IMPORTED.clear()


@pytest.fixture
def config(place, tmp_path):  # noqa: F811
    settings = yaml.safe_load((place / "config.yaml").read_text())
    settings |= {"strategy": {"of-mine": {"strength": 0.5}}, "output_dir": str(tmp_path / "out")}
    settings["training"] |= {"num_train_epochs": 1, "pictures": False}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    (tmp_path / "mine.py").write_text(MINE)
    return path


def test_a_strategy_of_ones_own_in_a_run(config, tmp_path, capsys):
    assert main(["train", str(config)]) == 2
    assert "There is no setting strategy.of-mine" in capsys.readouterr().err
    assert main(["train", str(config), "--import", str(tmp_path / "mine.py")]) == 0
    results = RunResults.load(tmp_path / "out")
    assert results.method == "CODA-Prompt + Mine"
    assert results.hyperparameters["strategy"] == {"Mine": {"strength": 0.5}}


@pytest.mark.slow
def test_a_strategy_of_ones_own_in_a_suite(config, tmp_path, monkeypatch, capsys):
    """The runs are other processes, in which the name must be known too; the file is named from another folder."""
    settings = yaml.safe_load(config.read_text())
    del settings["output_dir"]
    suite = {"output_dir": "suite", "defaults": settings, "methods": {"Mine": {}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "suite.yaml", "--import", "mine.py", "--quiet"]) == 0
    assert RunResults.load(tmp_path / "suite" / "runs" / "mine" / "seed0").method == "CODA-Prompt + Mine"


def test_what_cannot_be_imported(tmp_path, capsys):
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    for words, message in (
        (["--import"], "--import has no value"),
        (["--import", str(tmp_path / "none.py")], "but there is no such file. Correct the path"),
        (["--import", "no_module_of_this_name"], "--import is 'no_module_of_this_name', but there is no such module"),
        (
            ["--import", str(tmp_path / "broken.py")],
            "broken.py, line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'",
        ),
    ):
        assert main(["train", "run.yaml", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_name_is_given_once():
    @register_strategy("named")
    class First(Strategy):
        pass

    with pytest.raises(ValueError, match="The strategy 'named' is .*First already. Give yours another name"):

        @register_strategy("named")
        class Second(Strategy):
            pass


def test_the_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = runpy.run_path(str(EXAMPLES / "custom_strategy.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "Fine-tuning + Pull back: " in printed and "\nFine-tuning: " in f"\n{printed}"
    lines = Path(EXAMPLES / "custom_strategy.py").read_text().splitlines()
    begin = lines.index('@register_strategy("pull-back")')
    assert lines.index('if __name__ == "__main__":') - begin < 40
    with pytest.raises(ValueError, match="strength is -1"):
        module["PullBack"](-1)
