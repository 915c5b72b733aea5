"""`peft-cl tune`: what is searched, what it is judged by, and that it goes on as if nothing had happened."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from cli_fixtures import COLOURS, EXAMPLES, pictures
from datasets import Dataset, Image

from peft_cl import ContinualTrainer, RunResults, class_incremental, domain_incremental, task_free
from peft_cl.cli import main
from peft_cl.commands.options import parse_yaml, read_config
from peft_cl.commands.trial import Plan, Trials
from peft_cl.commands.tune_input import check_edges, with_settings
from peft_cl.commands.tune_run import trials_of_a_worker
from peft_cl.tuning.holdout import first_tasks, hold_out
from peft_cl.tuning.search import FAILED, FILE, FINISHED, PRUNED, Outcome, Search, differences, kept_facts
from peft_cl.tuning.space import Choice, Range, parse_space
from peft_cl.tuning.workers import Runner, surroundings


# ----------------------------------------------------------------------------------------------- the space


def test_a_space_is_read_as_it_is_written():
    text = (
        "{training.learning_rate: {low: 1.0e-4, high: 1.0e-1, log: true}, adapter.pool_size: {low: 5, high: 50, "
        "step: 5}, adapter.head: [linear, lda], strategy.ewc.strength: {low: 1, high: 1.0e+5, log: true}, "
        "adapter.layers: [[0, 1], null, true, 1]}"
    )
    space = parse_space(parse_yaml(text, "space"))
    assert space[0] == Range("training.learning_rate", 1e-4, 0.1, log=True)
    assert space[1] == Range("adapter.pool_size", 5, 50, step=5)
    assert space[2] == Choice("adapter.head", ("linear", "lda"))
    # One end with a point: numbers of any kind.
    assert space[3] == Range("strategy.ewc.strength", 1.0, 1e5, log=True) and isinstance(space[3].low, float)
    kinds = [type(each.distribution()).__name__ for each in space]
    assert kinds == ["FloatDistribution", "IntDistribution", *["CategoricalDistribution"] * 1, "FloatDistribution"] + [
        "CategoricalDistribution"
    ]
    # true is not 1 and a list is a list, whatever optuna keeps of them.
    assert [space[4].value(drawn) for drawn in space[4].distribution().choices] == [[0, 1], None, True, 1]
    assert space[4].value("true") is True


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("null", "search is missing"),
        ("{}", "search is {}, but must be a mapping"),
        ("[1]", "must be a mapping"),
        ("{a.b: []}", "has 0 values"),
        ("{a.b: [1]}", "has 1 value, so there is nothing to choose"),
        ("{a.b: [1, 2, 1]}", "1 more than once"),
        ("{a.b: 0.1}", "a.b is 0.1, but must be a range or a list"),
        ("{a.b: {low: 2, high: 1}}", "low 2 and high 1, but low must be below high"),
        ("{a.b: {low: 1, high: 1}}", "A single value belongs into its own section"),
        ("{a.b: {low: 0, high: 1, log: true}}", "log and low 0, but a logarithm needs numbers above 0"),
        ("{a.b: {low: 0, high: 1, log: 1}}", "a.b.log is 1, but must be true or false"),
        ("{a.b: {low: 0, hihg: 1}}", "Did you mean high?"),
        ("{a: {b: 1}}", "Settings have dotted names, such as a.b"),
        ("{a.b: {low: 0}}", "a.b has no high"),
        ("{a.b: {low: 0, high: .inf}}", "a.b.high is inf, but must be a finite number"),
        ("{a.b: {low: .nan, high: 1}}", "a.b.low is nan"),
        ("{a.b: {low: true, high: 2}}", "a.b.low is True"),
        ("{a.b: {low: '0', high: 2}}", "a.b.low is '0'"),
        ("{a.b: {low: 1, high: 9, step: 0}}", "a.b.step is 0, but must be above 0 and at most high - low, 8"),
        ("{a.b: {low: 1, high: 9, step: 10}}", "a.b.step is 10"),
        ("{a.b: {low: 1, high: 9, step: 3}}", "Give a high such as 7"),
        ("{a.b: {low: 1, high: 9, step: 2, log: true}}", "both log and step"),
        ("{1: [1, 2]}", "search has 1, but settings have names"),
    ],
)
def test_what_is_no_space_is_refused(section, expected):
    with pytest.raises(ValueError) as caught:
        parse_space(parse_yaml(section, "space"))
    assert expected in str(caught.value)


# ----------------------------------------------------------------------------------------------- the images


def test_the_same_share_of_each_class_and_domain_is_held_out():
    labels = [0] * 20 + [1] * 10 + [2] * 5 + [3] * 2 + [4]
    data = Dataset.from_dict({"label": labels, "row": list(range(len(labels)))})
    rest, held = hold_out(data, ["label"], 0.2, seed=3)
    assert np.bincount(held["label"]).tolist() == [4, 2, 1, 1]  # of one image nothing
    assert sorted([*rest["row"], *held["row"]]) == list(range(len(labels)))
    assert hold_out(data, ["label"], 0.2, seed=3)[1]["row"] == held["row"]
    assert hold_out(data, ["label"], 0.2, seed=4)[1]["row"] != held["row"]
    domains = data.add_column("domain", ["day", "night"] * 19)
    held = hold_out(domains, ["label", "domain"], 0.2, seed=3)[1]
    assert held.filter(lambda row: row["domain"] == "day")["label"].count(0) == 2


def test_the_first_tasks_are_those_of_the_whole_sequence():
    train = pictures(10, 0)
    parts = hold_out(train, ["label"], 0.2, seed=0)
    whole, usual = (class_incremental(data, 4, seed=3) for data in (parts, (train, pictures(5, 1))))
    first = first_tasks(whole, 3)
    assert [task.classes for task in first] == [task.classes for task in usual[:3]]
    assert first.describe()["test_sizes"] == [2, 2, 2] and first.describe()["train_sizes"] == [8, 8, 8]
    with pytest.raises(ValueError, match="--tasks is 5, but must be from 1 to 4"):
        first_tasks(whole, 5)


def test_a_stream_is_learnt_whole():
    parts = hold_out(pictures(10, 0), ["label"], 0.2, seed=0)
    stream = task_free(parts, 2, passes=2)
    with pytest.raises(ValueError, match="stream, which has no first tasks.*Give --tasks 2"):
        first_tasks(stream, 1)
    # An image that is held out comes in none of its passes.
    learnt = {np.asarray(row["image"]).tobytes() for task in first_tasks(stream, 2) for row in task.train}
    judged = {np.asarray(row["image"]).tobytes() for task in stream for row in task.test}
    assert len(learnt) == 32 and len(judged) == 8 and not learnt & judged


def test_a_class_with_one_image_is_named():
    data = pictures(3, 0).select([0, 1, 2, 3, 6, 7, 8, 9, 10, 11])  # one green one
    whole = class_incremental(hold_out(data, ["label"], 0.3, seed=0), 2)
    with pytest.raises(ValueError, match="No image of green in 'task_0' can be held out"):
        first_tasks(whole, 2)
    by_domain = pictures(4, 0).add_column("domain", ["night"] + ["day"] * 7 + ["night", "day"] * 4)
    whole = domain_incremental(hold_out(by_domain, ["label", "domain"], 0.3, seed=0))
    assert whole[1].classes == ("red", "blue", "yellow")
    with pytest.raises(ValueError, match="No image of red in 'night'"):
        first_tasks(whole, 2)


# ----------------------------------------------------------------------------------------------- the search


SPACE = [Range("a.rate", 1e-4, 1.0, log=True), Range("a.size", 5, 50, step=5), Choice("a.kind", ("x", [1, 2], None))]


def judged(settings: dict) -> float:
    return -abs(math.log10(settings["a.rate"]) + 2) - settings["a.size"] / 100 + (settings["a.kind"] == [1, 2])


def make(search: Search, trials: int) -> list[dict]:
    """Makes trials until there are so many; returns the settings of all."""
    while search.begun < trials or search.waiting:
        trial = search.next()
        value = judged(search.settings(trial))
        search.tell(trial, Outcome(FINISHED, {"average_accuracy": value}, 1.0), value)
    return [row.settings for row in search.rows()]


def test_the_same_seed_gives_the_same_search_wherever_it_is_interrupted(tmp_path):
    whole = make(Search(tmp_path / "whole", SPACE, seed=7), 16)
    assert make(Search(tmp_path / "again", SPACE, seed=7), 16) == whole
    assert make(Search(tmp_path / "other", SPACE, seed=8), 16) != whole
    part = tmp_path / "part"
    make(Search(part, SPACE, seed=7), 4)
    Search(part, SPACE, seed=7).next()  # in the middle of the fifth
    make(Search(part, SPACE, seed=7), 13)  # after ten, proposals rest on what came before
    lost = Search(part, SPACE, seed=7)
    begun = lost.settings(lost.next())
    again = Search(part, SPACE, seed=7)
    assert again.waiting == 1 and again.begun == 14
    assert make(again, 16) == whole and whole[13] == begun
    assert [row.number for row in again.rows()] == list(range(1, 17))


def test_the_first_ten_are_drawn_at_random_and_later_ones_from_what_came_of_them(tmp_path):
    small, large = (Search(tmp_path / name, SPACE[1:2]) for name in ("small", "large"))
    for search, sign in ((small, -1), (large, 1)):
        for _ in range(16):
            trial = search.next()
            search.tell(trial, Outcome(FINISHED), sign * trial.params["a.size"])
    drawn = [[row.settings["a.size"] for row in search.rows()] for search in (small, large)]
    assert drawn[0][:10] == drawn[1][:10]
    assert np.mean(drawn[0][10:]) < np.mean(drawn[0][:10]) < np.mean(drawn[1][10:])


def test_the_importance_of_settings_is_their_share(tmp_path):
    search = Search(tmp_path, SPACE)
    make(search, 12)
    shares = search.importance()
    assert set(shares) == {each.name for each in SPACE} and sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert search.ranking()[0].value == max(row.value for row in search.rows())


def test_half_a_line_in_the_file_is_no_trial(tmp_path):
    """A process can be killed in the middle of writing."""
    whole = make(Search(tmp_path / "whole", SPACE), 4)
    make(Search(tmp_path / "part", SPACE), 3)
    with open(tmp_path / "part" / FILE, "ab") as file:
        file.write(b'{"op_code":4,"wor')
    assert make(Search(tmp_path / "part", SPACE), 4) == whole
    assert kept_facts(tmp_path / "part") == {} and kept_facts(tmp_path) is None
    (tmp_path / "part" / FILE).write_text("no journal\n")
    with pytest.raises(ValueError, match="is damaged .*Give --overwrite"):
        kept_facts(tmp_path / "part")


def test_a_trial_that_ends_the_process_each_time_is_given_up(tmp_path):
    first = Search(tmp_path, SPACE)
    settings = first.settings(first.next())
    for _ in range(2):
        again = Search(tmp_path, SPACE)
        assert again.settings(again.next()) == settings
    (row,) = Search(tmp_path, SPACE).rows()
    assert (row.number, row.state, row.settings) == (1, FAILED, settings)
    assert row.reason == "interrupted 3 times, and not begun again"


def test_failed_trials_are_kept_and_count(tmp_path):
    search = Search(tmp_path, SPACE, lower_is_better=True)
    search.tell(search.next(), Outcome(FAILED, reason="no memory"))
    assert search.ranking() == [] and search.importance() == {}
    for value in (0.5, 0.25, 0.25):
        search.tell(search.next(), Outcome(FINISHED, {"forgetting": value}), value)
    assert [(row.number, row.value) for row in search.ranking()] == [(3, 0.25), (4, 0.25), (2, 0.5)]
    assert search.begun == 4 and search.rows()[0].reason == "no memory" and math.isnan(search.rows()[0].value)


def test_a_trial_below_the_median_is_given_up(tmp_path):
    search = Search(tmp_path, SPACE, prune=True)
    for value in (0.5, 0.6, 0.7, 0.8, 0.9):
        trial = search.next()
        assert not search.report(trial, 0, value)  # the first five never
        search.tell(trial, Outcome(FINISHED, {}), value)
    for value, given_up in ((0.75, False), (0.65, True)):  # median 0.7
        trial = search.next()
        assert search.report(trial, 0, value) is given_up
        search.tell(trial, Outcome(PRUNED if given_up else FINISHED), None if given_up else value)
    assert (search.rows()[-1].state, search.rows()[-1].value) == (PRUNED, 0.65)
    assert 0.65 not in [row.value for row in search.ranking()]


def test_differences_are_named():
    before = {"tasks": 3, "config": {"training": {"seed": 1}, "method": "l2p"}}
    assert differences(before, {"tasks": 3, "config": {"training": {}, "method": "coda"}}) == [
        "config.training.seed: was 1, is not there",
        'config.method: was "l2p", is "coda"',
        "config.training: was not there, is {}",
    ]


# ----------------------------------------------------------------------------------------------- several at once


class Attempts:
    """What stands for the training of trials in a process: one size ends it, with another a trial fails."""

    def __call__(self, number, settings, watch):
        if settings["a.size"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if settings["a.size"] == 10:
            return Outcome(FAILED, reason="size 10")
        if watch(0, 0.5):
            return Outcome(PRUNED)
        threads = float(os.environ["OMP_NUM_THREADS"])
        return Outcome(FINISHED, {"m": judged(settings), "process": float(os.getpid()), "threads": threads}, 1.0)


@pytest.mark.slow
def test_trials_at_once_have_processes_of_their_own(tmp_path):
    space = [Range("a.rate", 1e-4, 1.0, log=True), Range("a.size", 5, 25, step=5), Choice("a.kind", ("x", "y"))]
    search, heard, over = Search(tmp_path, space, seed=41), [], []  # draws 5 once, and 10 once
    runner = Runner(search, "m", 8, lambda *facts: heard.append(facts), over.append)
    runner.in_processes(Attempts, surroundings(2, {}, 6, 0))
    rows = search.rows()
    assert sorted(row.number for row in over) == [row.number for row in rows] == list(range(1, 9))
    ends = {row.settings["a.size"]: (row.state, row.reason) for row in rows}
    assert ends[5] == (FAILED, "its process was ended by signal 9 (SIGKILL)") and ends[10] == (FAILED, "size 10")
    finished = [row for row in rows if row.state == FINISHED]
    assert len(finished) == 6 and all(row.value == judged(row.settings) for row in finished)
    processes = {row.metrics["process"] for row in finished}
    assert len(processes) >= 2 and os.getpid() not in processes
    assert {row.metrics["threads"] for row in finished} == {3.0}
    assert sorted(number for number, *_ in heard) == [row.number for row in finished]


def test_cores_are_divided_and_devices_dealt_out():
    assert surroundings(2, {}, 1, 1) == [{"OMP_NUM_THREADS": "1"}] * 2
    assert surroundings(2, {"OMP_NUM_THREADS": "4"}, 16, 0) == [{}, {}]
    dealt = surroundings(3, {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "4,6"}, 16, 2)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in dealt] == ["4", "6", "4"]


# ----------------------------------------------------------------------------------------------- the command


SEARCH = {
    "training.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
    "adapter.components_per_task": [2, 3, 90],
}


@pytest.fixture(scope="module")
def configuration(place, tmp_path_factory) -> Path:
    """A configuration with a search, its test images of bytes that are none; with 90 components trials fail."""
    folder = tmp_path_factory.mktemp("tune")
    shutil.copytree(place / "data", folder / "data")
    test = Dataset.from_parquet(str(folder / "data" / "test.parquet"))
    unreadable = [{"bytes": f"no image {row}".encode(), "path": None} for row in range(len(test))]
    labels, features = test["label"][:], test.features
    broken = Dataset.from_dict({"label": labels}).add_column("image", unreadable)
    broken = broken.cast_column("image", Image()).cast_column("label", features["label"])
    broken.to_parquet(str(folder / "data" / "test.parquet"))
    config = yaml.safe_load((place / "config.yaml").read_text())
    config |= {"dataset": {"path": str(folder / "data")}, "search": SEARCH}
    config["training"] |= {"max_steps": 2}
    (folder / "tune.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "tune.yaml"


def tune(configuration: Path, folder: Path, *words: str) -> int:
    return main(
        ["tune", str(configuration), "--output_dir", str(folder), "--trials", "3", "--holdout", "0.25", *words]
    )


def outcomes(folder: Path) -> list[dict]:
    trials = json.loads((folder / "trials.json").read_text())["trials"]
    return [{name: value for name, value in each.items() if name != "seconds"} for each in trials]


def unfit(self, number, settings, watch):
    """A trial that fails where it has 90 components, in the middle of it."""
    if settings["adapter.components_per_task"] == 90:
        settings = {**settings, "adapter.layers": [7]}
    return CALL(self, number, settings, watch)


CALL = Trials.__call__


@pytest.fixture(scope="module")
def tuned(configuration, tmp_path_factory) -> Path:
    """The folder of a search of three trials, of which one fails."""
    folder = tmp_path_factory.mktemp("tuned") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "__call__", unfit)
        assert tune(configuration, folder, "--sampler-seed", "2") == 0
    return folder


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


# ----------------------------------------------------------------------------------------------- bad input


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
