"""`peft-cl tune`: what it is judged by, what it writes, and that it goes on as if nothing had happened."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil

import numpy as np
import pytest
import yaml
from cli_fixtures import COLOURS, EXAMPLES
from tune_cases import (
    SEARCH,
    make_configuration,  # noqa: F401
    make_tuned,  # noqa: F401
    outcomes,
    tune,
    unfit,
)

from peft_cl import ContinualTrainer, RunResults
from peft_cl.cli import main
from peft_cl.commands.options import read_config
from peft_cl.commands.trial import Plan, Trials
from peft_cl.commands.tune_input import check_edges, with_settings
from peft_cl.commands.tune_run import trials_of_a_worker
from peft_cl.tuning.search import FAILED, FINISHED
from peft_cl.tuning.space import parse_space


def test_a_search_reads_no_test_image_and_survives_a_trial_that_fails(tuned, capsys):
    """The test images cannot be read, and none is."""
    trials = outcomes(tuned)
    states = [each["state"] for each in trials]
    assert sorted(states) == [FAILED, FINISHED, FINISHED]
    failed = trials[states.index(FAILED)]
    assert failed["settings"]["adapter.components_per_task"] == 90 and "2 layers" in failed["reason"]
    assert failed["value"] is None
    for each in trials:
        record = tuned / "trials" / f"{each['number']:04d}" / "seed_42"
        if each["state"] == FAILED:
            assert not record.parent.exists()
            continue
        results = RunResults.load(record)
        # Two of eight images of each of four classes; both tasks, as the whole scenario has them.
        assert results.test_sizes == [4, 4] and results.scenario["train_sizes"] == [12, 12]
        assert results.metrics["average_accuracy"] == each["value"] == each["metrics"]["average_accuracy"]
        assert results.hyperparameters["learning_rate"] == each["settings"]["training.learning_rate"]
        assert [path.name for path in record.iterdir()] == ["results.json"]  # no adapter, no card, no pictures
    with open(tuned / "trials.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["trial"], row["state"], row["reason"]) for row in table] == [
        (str(each["number"]), each["state"], each["reason"]) for each in trials
    ]


def test_the_best_configuration_is_one_to_train(tuned, configuration, place, tmp_path):
    best = read_config(tuned / "best.yaml")
    finished = [each for each in outcomes(tuned) if each["state"] == FINISHED]
    value = max(each["value"] for each in finished)
    winner = next(each for each in finished if each["value"] == value)
    assert best["output_dir"] == str(tuned / "best") and "search" not in best
    assert best["training"]["learning_rate"] == winner["settings"]["training.learning_rate"]
    assert best["adapter"]["components_per_task"] == winner["settings"]["adapter.components_per_task"]
    rest = with_settings(best, dict.fromkeys((*SEARCH, "output_dir")))
    given = read_config(configuration)
    given.pop("search")
    assert rest == with_settings(given, dict.fromkeys((*SEARCH, "output_dir")))
    words = ["--dataset.path", str(place / "data"), "--training.pictures", "false"]  # whose test images can be read
    assert main(["train", str(tuned / "best.yaml"), *words, "--output_dir", str(tmp_path / "best")]) == 0
    results = RunResults.load(tmp_path / "best")
    assert results.test_sizes == [10, 10] and results.scenario["train_sizes"] == [16, 16]


def test_a_search_that_is_interrupted_in_a_trial_goes_on_as_if_it_had_not_been(
    tuned, configuration, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Trials, "__call__", unfit)
    learn, learnt = ContinualTrainer.train_task, []

    def interrupted(self, task):
        learnt.append(task)
        if len(learnt) == 2:
            raise KeyboardInterrupt
        return learn(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(ContinualTrainer, "train_task", interrupted)
        assert tune(configuration, tmp_path / "out", "--sampler-seed", "2") == 130
    assert "The trials finished are saved; --resume goes on with them." in capsys.readouterr().err
    # What it was begun with need not be said again.
    assert main(["tune", str(tmp_path / "out"), "--resume"]) == 0
    assert outcomes(tmp_path / "out") == outcomes(tuned)
    changed = {"--tasks": "1", "--sampler-seed": "3", "--training.max_steps": "1", "--holdout": "0.5"}
    for word, value in changed.items():
        assert main(["tune", str(tmp_path / "out"), "--resume", word, value]) == 2
        name = word.removeprefix("--").replace("-", "_").replace("training", "config.training")
        assert f"{name}: was " in capsys.readouterr().err.replace("data.", "")
    search = tmp_path / "search.yaml"
    search.write_text(yaml.safe_dump({**SEARCH, "adapter.components_per_task": [2, 3]}))
    config = read_config(configuration)
    config.pop("search")
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(config))
    assert tune(tmp_path / "tune.yaml", tmp_path / "out", "--resume", "--search", str(search)) == 2
    assert "search.adapter.components_per_task: was [2, 3, 90], is [2, 3]" in capsys.readouterr().err
    assert tune(configuration, tmp_path / "out") == 2
    assert "holds a search already" in capsys.readouterr().err


def test_several_seeds_are_judged_by_their_mean(configuration, tmp_path):
    words = [
        "--trials",
        "1",
        "--seeds",
        "2",
        "--tasks",
        "1",
        "--metric",
        "overall_accuracy",
        "--training.max_steps",
        "1",
    ]
    assert tune(configuration, tmp_path / "out", *words) == 0
    records = [RunResults.load(tmp_path / "out" / "trials" / "0001" / f"seed_{seed}") for seed in (42, 43)]
    assert [record.seed for record in records] == [42, 43] and records[0].task_names == ["task_0"]
    (trial,) = outcomes(tmp_path / "out")
    assert trial["value"] == np.mean([record.metrics["overall_accuracy"] for record in records])


@pytest.mark.slow
def test_trials_in_processes_give_what_they_give_here(tuned, configuration, tmp_path):
    space = {"training.learning_rate": [0.001, 0.1], "adapter.components_per_task": [2, 3]}
    search = tmp_path / "search.yaml"
    search.write_text(yaml.safe_dump({"search": space}))
    config = read_config(configuration)
    config.pop("search")
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(config))
    words = [str(tmp_path / "tune.yaml"), "--search", str(search), "--trials", "3"]
    for folder, jobs in (("one", "1"), ("two", "2")):
        assert main(["tune", *words, "--output_dir", str(tmp_path / folder), "--jobs", jobs]) == 0
    one, two = (
        {json.dumps(each["settings"]): each["value"] for each in outcomes(tmp_path / folder)}
        for folder in ("one", "two")
    )
    common = one.keys() & two.keys()
    assert common and all(one[settings] == two[settings] for settings in common)


def test_a_process_of_its_own_knows_the_code_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.WARNING)
    (tmp_path / "own.py").write_text("import os\nos.environ['PEFT_CL_TEST_IMPORTED'] = 'yes'\n")
    monkeypatch.setenv("PEFT_CL_TEST_IMPORTED", "no")
    trials = trials_of_a_worker({}, Plan(1, 0.2, 0, (42,), "forgetting", tmp_path), [str(tmp_path / "own.py")])
    assert isinstance(trials, Trials) and os.environ["PEFT_CL_TEST_IMPORTED"] == "yes"


def test_a_folder_with_a_run_is_left_alone(configuration, trained, capsys):
    before = sorted(path.name for path in trained.iterdir())
    for words in ([], ["--overwrite"], ["--resume"]):
        assert main(["tune", str(configuration), "--output_dir", str(trained), *words]) == 2
        assert "holds a run of peft-cl train" in capsys.readouterr().err
    assert sorted(path.name for path in trained.iterdir()) == before


def test_overwrite_begins_anew(tuned, configuration, tmp_path):
    shutil.copytree(tuned, tmp_path / "out")
    (tmp_path / "out" / "best").mkdir()
    assert tune(configuration, tmp_path / "out", "--overwrite", "--trials", "1", "--tasks", "1") == 0
    assert len(outcomes(tmp_path / "out")) == 1
    assert not (tmp_path / "out" / "trials" / "0002").exists() and (tmp_path / "out" / "best").is_dir()


def test_the_example_is_a_search():
    config = read_config(EXAMPLES / "tune_l2p.yaml")
    space = parse_space(config.pop("search"))
    assert len(space) == 4 and len(check_edges(config, space)) >= 8
    assert len(COLOURS) == 4
