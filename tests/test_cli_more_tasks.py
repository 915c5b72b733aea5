"""The command on saved adapters that learn on, on streams, and with comparison methods added."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cli_fixtures import COLOURS
from peft import PeftConfig
from safetensors.torch import load_file

from peft_cl import ContinualTrainer, RunResults
from peft_cl.cli import main


ANEW = ("--preset", "null", "--adapter", "null")


@pytest.fixture
def first(train, tmp_path, capsys) -> str:
    """An adapter that knows two of the four classes."""
    folder = str(tmp_path / "first")
    capsys.readouterr()
    words = ("--scenario", "{num_tasks: 1, class_order: [red, green]}", "--output_dir", folder)
    assert train(*words) == 0
    assert "left out:      2 classes of the data: blue, yellow\n" in capsys.readouterr().out
    return folder


def test_a_saved_adapter_learns_on(first, train, place, tmp_path, capsys):
    capsys.readouterr()
    more = ("--scenario", "{num_tasks: 1, class_order: [blue, yellow]}", "--continue-from", first)
    assert train(*more, *ANEW) == 0
    plan = capsys.readouterr().out
    assert f"{first}, which has learnt 1 task;" in plan and "left out:" not in plan
    config = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert config.classes == list(COLOURS) and config.tasks == [[0, 1], [2, 3]]
    results = RunResults.load(tmp_path / "out")
    assert results.finished_tasks == 2 and results.task_names == ["task_0", "task_1"]
    # All four classes are answered by the one adapter.
    assert main(["evaluate", str(tmp_path / "out"), "--dataset", str(place / "data")]) == 0
    assert "task_0" in (text := capsys.readouterr().out) and "task_1" in text


def test_the_new_task_has_one_name_everywhere_and_earlier_ones_are_measured(first, train, place, tmp_path, capsys):
    more = ("--scenario", "{num_tasks: 1, class_order: [blue, yellow]}", "--continue-from", first, *ANEW)
    capsys.readouterr()
    assert train(*more, "--earlier_test", str(place / "data")) == 0
    assert "tasks before:  task_0 measured" in capsys.readouterr().out
    results = RunResults.load(tmp_path / "out")
    matrix = np.array(results.accuracy_matrix)
    assert not np.isnan(matrix[np.tril_indices(2)]).any()
    assert matrix[0, 0] == RunResults.load(first).accuracy_matrix[0][0]
    assert main(["evaluate", str(tmp_path / "out"), "--dataset", str(place / "data"), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["tasks"]
    assert measured == pytest.approx(dict(zip(results.task_names, matrix[1], strict=True)))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| task_1 |" in card and "not measured" not in card


def test_bad_images_of_earlier_tasks(first, refused, place):
    more = ("--scenario", "{num_tasks: 1, class_order: [blue, yellow]}", *ANEW)
    on = (*more, "--continue-from", first)
    preset = more[:2]
    assert "earlier_test is given, but continue_from is not" in refused(*preset, "--earlier_test", "x")
    assert "There is no data set './nowhere'" in refused(*on, "--earlier_test", "./nowhere")
    assert "has no split 'dev'" in refused(*on, "--earlier_test", f"{{path: {place / 'data'}, test_split: dev}}")
    assert "names 'task_7', but the tasks are task_0" in refused(
        *on, "--earlier_test", f"{{task_7: {place / 'data'}}}"
    )


def test_the_adapter_says_its_base_model_and_how_it_was_loaded(first, place, tmp_path, capsys):
    more = yaml.safe_load((place / "config.yaml").read_text())
    more["scenario"] = {"num_tasks": 1, "class_order": ["blue", "yellow"]}
    more = {name: more[name] for name in ("dataset", "scenario", "training")} | {"output_dir": str(tmp_path / "out")}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
    assert main(["train", str(tmp_path / "more.yaml"), "--continue-from", first]) == 0
    results = RunResults.load(tmp_path / "out")
    assert results.method == "CODA-Prompt"
    assert PeftConfig.from_pretrained(str(tmp_path / "out")).base_model_name_or_path == str(place / "model")
    assert results.hyperparameters["backbone_dtype"] == "float32"


def test_another_base_model_than_the_adapters_is_refused(first, place, tmp_path, refused):
    shutil.copytree(place / "model", tmp_path / "other")
    more = ("--scenario", "{num_tasks: 1, class_order: [blue, yellow]}", "--continue-from", first, *ANEW)
    message = refused(*more, "--model", str(tmp_path / "other"))
    assert "other', but the adapter" in message and "Leave model.name out" in message


def test_a_fine_tuned_backbone_learns_on_from_its_own_weights(train, tmp_path, refused):
    tuned, method = str(tmp_path / "tuned"), ("--method", "fine-tuning", *ANEW)
    assert train("--scenario", "{num_tasks: 1, class_order: [red, green]}", "--output_dir", tuned, *method) == 0
    more = ("--scenario", "{num_tasks: 1, class_order: [blue, yellow]}", "--continue-from", tuned, *method)
    assert "fits no other" in refused(*more)  # the backbone that it began with, which the configuration names


def test_a_fine_tuned_backbone_goes_on_with_what_it_learnt(train, tmp_path, monkeypatch):
    tuned, method = str(tmp_path / "tuned"), ("--method", "fine-tuning", *ANEW)
    assert train("--scenario", "{num_tasks: 1, class_order: [red, green]}", "--output_dir", tuned, *method) == 0
    begun, train_method = [], ContinualTrainer.train

    def look(self):
        begun.append(self.tuner.encoder.base_layer.layers[0].attention.q_proj.weight.detach().clone())
        return train_method(self)

    monkeypatch.setattr(ContinualTrainer, "train", look)
    more = ("--scenario", "{num_tasks: 1, class_order: [blue, yellow]}", "--continue-from", tuned, *method)
    assert train(*more, "--model", "null") == 0
    learnt = load_file(Path(tuned) / "backbone" / "model.safetensors")
    assert any(torch.equal(begun[0], weight) for weight in learnt.values() if weight.shape == begun[0].shape)


def test_the_adapter_to_continue_from_is_not_written_over(first, train, capsys):
    before = {path.name: path.read_bytes() for path in Path(first).iterdir() if path.is_file()}
    more = ("--scenario", "{num_tasks: 1, class_order: [blue, yellow]}", "--continue-from", first, *ANEW)
    assert train(*more, "--output_dir", first, "--overwrite") == 2
    assert "holds the adapter to continue from. Give another output_dir" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path(first).iterdir() if path.is_file()} == before


def test_settings_beside_those_of_the_adapter_are_refused(first, train, capsys):
    more = ("--scenario", "{num_tasks: 1, class_order: [blue, yellow]}", "--continue-from", first)
    assert train(*more) == 2
    assert "preset and adapter are given too. Take them out, for instance by --preset null --adapter null" in (
        capsys.readouterr().err
    )


def test_the_method_must_fit_the_adapter(first, train, capsys):
    more = ("--scenario", "{num_tasks: 1, class_order: [blue, yellow]}", "--continue-from", first)
    assert train(*more, *ANEW, "--method", "l2p") == 2
    assert "The adapter is one of coda, and method is 'l2p'" in capsys.readouterr().err


def test_an_adapter_that_is_not_there(train, capsys):
    assert train("--continue-from", "./nowhere", *ANEW) == 2
    assert "There is no adapter './nowhere'" in capsys.readouterr().err


def test_a_stream_trains_from_a_configuration(train, tmp_path, capsys):
    stream = ("--scenario", "{kind: task-free, num_tasks: 2, blur: 0.5}")
    assert train(*stream) == 2
    assert "num_train_epochs is 2" in (error := capsys.readouterr().err) and "passes" in error
    assert train(*stream, "--training.num_train_epochs", "1") == 0
    results = RunResults.load(tmp_path / "out")
    assert results.scenario["name"] == "task-free" and not results.scenario["boundaries"]
    assert results.finished_tasks == 2


@pytest.mark.parametrize(
    ("strategy", "name"),
    [("er: {memory_size: 8}", "CODA-Prompt + ER"), ("ewc: {strength: 10}", "CODA-Prompt + EWC"), ("joint:", "")],
)
def test_a_comparison_method_is_added(strategy, name, train, tmp_path):
    words = ("--strategy", f"{{{strategy}}}", "--adapter.train_mask", "false", "--training.max_steps", "2")
    assert train(*words) == 0
    results = RunResults.load(tmp_path / "out")
    assert results.method == (name or "CODA-Prompt + joint training")
    assert np.isfinite(results.metrics["average_accuracy"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--strategy", "ers"], ["strategy.ers", "er"]),
        (["--strategy", "{er: {memry_size: 3}}"], ["strategy.er.memry_size", "memory_size"]),
        (["--strategy", "{er: {memory_size: 0}}"], ["memory_size is 0"]),
        (["--strategy", "{ewc: 10}"], ["strategy.ewc is 10", "a mapping"]),
        (["--strategy", "joint"], ["train_mask is True", "Set --adapter.train_mask False"]),
        (["--scenario.blur", "0.5"], ["blur does not go with the kind class-incremental"]),
        (["--scenario", "{kind: task-free, num_tasks: 2, blur: -1}"], ["blur is -1"]),
    ],
)
def test_bad_settings_are_refused_before_training(refused, words, expected):
    message = refused(*words)
    assert all(part in message for part in expected), message


def test_a_run_interrupted_in_its_first_task_is_resumed_from_its_checkpoint(train, tmp_path, monkeypatch, capsys):
    saving = ("--training.save_strategy", "steps", "--training.save_steps", "1")
    assert train(*saving, "--output_dir", str(tmp_path / "whole")) == 0
    steps, step = [], ContinualTrainer.training_step

    def counted(self, *words):
        steps.append(self.task.index)
        return step(self, *words) if len(steps) <= 3 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(ContinualTrainer, "training_step", counted)
        with pytest.raises(ZeroDivisionError):
            train(*saving)
    assert train(*saving) == 2
    assert "holds a run already (_state)" in (error := capsys.readouterr().err) and "--resume" in error
    del steps[:]
    monkeypatch.setattr(ContinualTrainer, "training_step", lambda self, *words: steps.append(0) or step(self, *words))
    assert train(*saving, "--resume") == 0
    assert len(steps) == 8 - 3  # 2 tasks, 2 epochs, 2 steps an epoch
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]


def test_a_data_set_after_the_other(train, place, tmp_path, capsys):
    two = f"{{first: {place / 'data'}, second: {{path: {place / 'single'}, test_fraction: 0.3}}}}"
    assert train("--dataset", two, "--scenario", "{kind: dataset-sequence}") == 0
    out = capsys.readouterr().out
    assert f"{place / 'data'}, {place / 'single'}, 60 training and 32 test images" in out
    results = RunResults.load(tmp_path / "out")
    assert results.task_names == ["first", "second"] and results.scenario["classes_per_task"] == [4, 4]
    assert results.hyperparameters["data"]["second"]["test_fraction"] == 0.3


def test_a_data_set_after_the_other_with_the_same_classes(train, place, tmp_path):
    two = f"{{first: {place / 'data'}, second: {{path: {place / 'single'}, test_fraction: 0.3}}}}"
    assert train("--dataset", two, "--scenario", "{kind: dataset-sequence, shared_classes: true}") == 0
    assert PeftConfig.from_pretrained(str(tmp_path / "out")).classes == list(COLOURS)


@pytest.mark.parametrize(
    ("dataset", "scenario", "words"),
    [
        ("some/where", "{kind: dataset-sequence}", "dataset is 'some/where', but a dataset-sequence has several"),
        ("{a: {path: x, pth: y}}", "{kind: dataset-sequence}", "dataset.a.pth"),
        ("{a: ./nowhere}", "{kind: dataset-sequence}", "There is no data set './nowhere'"),
        ("{}", "{kind: dataset-sequence}", "datasets is dict of 0"),
        ("{a: x}", "{kind: dataset-sequence, num_tasks: 3}", "num_tasks does not go with the kind dataset-sequence"),
        ("x", "{num_tasks: 2, shared_classes: true}", "shared_classes does not go with the kind class-incremental"),
    ],
)
def test_bad_sequences_of_data_sets(dataset, scenario, words, refused):
    assert words in refused("--dataset", dataset, "--scenario", scenario)
