"""`peft-cl tune`: what cannot work is refused before the first trial."""

from __future__ import annotations

import importlib.util

import pytest
import yaml
from tune_cases import (
    make_configuration,  # noqa: F401
    tune,
)

from peft_cl.cli import main
from peft_cl.commands.options import read_config
from peft_cl.commands.trial import Trials


@pytest.fixture
def refused(configuration, tmp_path, capsys, monkeypatch):
    """`refused(search, *words)` returns the line of the error, after seeing that no trial began."""

    def call(search: dict | None = None, *words: str) -> str:
        monkeypatch.setattr(Trials, "__call__", lambda *_: pytest.fail("a trial began"))
        config = read_config(configuration) | ({} if search is None else {"search": search})
        (tmp_path / "tune.yaml").write_text(yaml.safe_dump(config))
        assert tune(tmp_path / "tune.yaml", tmp_path / "out", *words) == 2
        assert not (tmp_path / "out" / "trials.csv").exists()
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("peft-cl: ")
        return line

    return call


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({"training.learning_rat": [1, 2]}, "Did you mean training.learning_rate?"),
        ({"learning_rate": [1, 2]}, "training.learning_rate exists: put it there."),
        ({"adapter.pool_size": {"low": 9, "high": 5}}, "low must be below high"),
        ({"method": ["coda", "codda"]}, 'search.method tries "codda", which is refused: There is no method codda.'),
        ({"training.learning_rate": {"low": -1, "high": 0.1}}, "search.training.learning_rate tries -1.0, which is"),
        ({"training.num_train_epochs": ["one", "two"]}, "must be a number"),
        ({"strategy.ewc.strenght": [1, 2]}, "Did you mean strategy.ewc.strength?"),
        ({"scenario.num_tasks": [2, 4]}, "search has scenario.num_tasks, but what is judged"),
        ({"training.seed": [1, 2]}, "Give --seeds for several."),
        ({}, "search is {}, but must be a mapping"),
    ],
)
def test_a_search_that_cannot_work_is_refused_before_the_first_trial(refused, search, expected):
    assert expected in refused(search)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tasks", "0"], "--tasks is 0, but must be a whole number of at least 1"),
        (["--tasks", "3"], "--tasks is 3, but must be from 1 to 2"),
        (["--holdout", "1"], "--holdout is 1, but must be a share between 0 and 1"),
        (["--holdout", "nan"], "--holdout is nan"),
        (["--trials", "0"], "--trials is 0"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--sampler-seed", "-1"], "--sampler-seed is -1, but must be a whole number of at least 0"),
        (["--metric", "acuracy"], "Known: average_accuracy"),
        (["--metric", "forward_transfer"], "only training.measure_ahead measures"),
        (["--metric", "forgetting", "--tasks", "1"], "which is 0 after a single task"),
        (["--dataset.label_column", "lable"], "There is no column 'lable'"),
        (["--adapter.layers", "[0, 7]"], "2 layers"),
        (["--adapter.pool_size", "3"], "pool_size is 3"),
        (["--continue_from", "somewhere"], "trials begin with a new adapter"),
        (["--search", "nowhere.yaml"], "no configuration file 'nowhere.yaml'"),
    ],
)
def test_options_that_cannot_work_are_refused_before_the_first_trial(refused, words, expected):
    assert expected in refused(None, *words)


def test_a_size_that_the_later_tasks_have_no_room_in_is_refused(refused):
    """Two components for the first task would do for it, but not for the run that the search is for."""
    assert "With all tasks of the scenario" in refused({"adapter.pool_size": [2, 3]}, "--tasks", "1")


def test_without_a_search_or_optuna(configuration, tmp_path, capsys, monkeypatch):
    config = read_config(configuration)
    config.pop("search")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["tune", str(tmp_path / "run.yaml")]) == 2
    assert "search is missing" in capsys.readouterr().err
    assert main(["train", str(configuration), "--output_dir", str(tmp_path / "out")]) == 2
    assert "The section search is for `peft-cl tune`" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["tune", str(configuration)]) == 2
    assert 'optuna, which is not installed: pip install "peft-cl[tune]"' in capsys.readouterr().err
