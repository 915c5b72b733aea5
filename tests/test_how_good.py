"""The end of a run says how good it is, and what comes next."""

from __future__ import annotations

import shlex

import pytest
from test_card import run

from peft_cl import ContinualTrainer, RunResults
from peft_cl.cli import main
from peft_cl.commands.summary import judged
from peft_cl.hub import model_card
from peft_cl.metrics import chance_level, standard_error


def test_chance_by_hand() -> None:
    classes = {"class_order": list("abcdef"), "classes_per_task": [2, 2, 2]}
    assert chance_level(run(scenario={"name": "class-incremental", **classes})) == 1 / 6
    assert chance_level(run(2, scenario={"name": "class-incremental", **classes})) == 1 / 4
    assert chance_level(run(scenario={"name": "task-incremental", **classes})) == 1 / 2
    domains = {"name": "domain-incremental", "class_order": list("ab"), "classes_per_task": [2, 2, 2]}
    assert chance_level(run(scenario=domains)) == 1 / 2
    assert chance_level(run(0)) is None and chance_level(run(scenario={})) is None


def test_standard_error_by_hand() -> None:
    # The last row is 0.5, 0.62, 0.83 on 20 images each.
    by_hand = ((0.25 + 0.62 * 0.38 + 0.83 * 0.17) / 20) ** 0.5 / 3
    assert standard_error(run()) == pytest.approx(by_hand)
    assert standard_error(run(0)) is None


def test_the_card_and_the_last_lines_compare_with_guessing() -> None:
    assert "Guessing among the classes gives 16.7 %." in model_card(run())
    (line,) = judged(run())
    assert line == "average accuracy 65.0 ± 5.9% (standard error of 60 test images), guessing 16.7%."
    assert "no better than guessing" in judged(run(metrics={"average_accuracy": 0.2}))[0]
    assert judged(run(scenario={})) == []


@pytest.mark.parametrize(
    ("accuracies", "compared"),
    [([0.5, 0.6, 0.7], "60.0 %: the run is 5.0 points above"), ([0.7] * 3, "70.0 %: the run is 5.0 points below")],
)
def test_the_row_without_prompts_is_told(accuracies, compared) -> None:
    results = run(without_prompts={"head": "LDA", "accuracies": accuracies})
    sentence = f"Without prompts, LDA of the frozen model's features gives {compared}."
    assert judged(results)[1] == sentence
    assert sentence in model_card(results)
    level = run(without_prompts={"head": "LDA", "accuracies": [0.65] * 3})
    assert judged(level)[1].endswith("gives 65.0 %: the run is level with it.")


def test_the_next_commands_work_when_followed(train, photos_of, tmp_path, capsys) -> None:
    assert train("--training.max_steps", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("standard error of 20 test images), guessing 25.0%" in line for line in lines)
    commands = [shlex.split(line.split("    # ")[0]) for line in lines[lines.index("Next:") + 1 :]]
    assert [words[1] for words in commands] == ["predict", "plot", "evaluate", "train"]
    for words in commands:
        assert main([photos_of if word == "IMAGE" else word for word in words[1:]]) == 0, words
    assert RunResults.load(f"{tmp_path / 'out'}_frozen").method.startswith("Frozen features")
    assert "frozen" not in " ".join(capsys.readouterr().out.splitlines()[-3:]).replace("out_frozen", "")


@pytest.fixture
def photos_of(place, tmp_path) -> str:
    from datasets import load_dataset

    load_dataset(str(place / "data"))["test"][0]["image"].save(tmp_path / "one.png")
    return str(tmp_path / "one.png")


def test_a_run_is_resumed_with_the_settings_that_it_had(train, place, tmp_path, capsys, monkeypatch) -> None:
    words = ("--training.learning_rate", "0.03", "--training.max_steps", "2", "--method", "coda")
    with monkeypatch.context() as patch:
        learn = ContinualTrainer.train_task
        stop = lambda self, task: learn(self, task) if task.index == 0 else 1 / 0  # noqa: E731
        patch.setattr(ContinualTrainer, "train_task", stop)
        with pytest.raises(ZeroDivisionError):
            train(*words, "--training.hub_token", "hf_secret")
    out = tmp_path / "out"
    assert not any(b"hf_secret" in file.read_bytes() for file in out.glob("*.json"))
    assert train("--resume") == 0  # --output_dir says which run
    assert "Goes on with task_1: 1 of 2 tasks finished." in capsys.readouterr().out
    results = RunResults.load(out)
    assert results.finished_tasks == 2 and results.hyperparameters["learning_rate"] == 0.03
    assert main(["train", str(out), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 tasks finished: nothing is trained" in printed and "--training.learning_rate 0.03" in printed
    assert main(["train", str(out), "--resume", "--training.learning_rate", "0.5"]) == 2
    assert "learning_rate" in capsys.readouterr().err
    (out / "_given.json").write_text("[")
    assert main(["train", str(out), "--resume"]) == 2 and "is damaged" in capsys.readouterr().err
    assert main(["train", str(out), "--overwrite"]) == 2  # a folder is no configuration
