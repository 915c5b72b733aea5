"""The search of `peft-cl tune`: its space, its held-out images, its trials, and several at once."""

from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest
from cli_fixtures import pictures
from datasets import Dataset

from peft_cl import class_incremental, domain_incremental, task_free
from peft_cl.commands.options import parse_yaml
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
