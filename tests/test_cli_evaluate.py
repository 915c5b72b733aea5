"""`peft-cl evaluate`: the tasks of a run by their names, told by the class or a column, or why there are none."""

from __future__ import annotations

import json

import pytest
from cli_fixtures import pictures
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTImageProcessorPil

from peft_cl import RunResults
from peft_cl.cli import main


@pytest.fixture
def domains(tmp_path) -> str:
    """A data set whose images come from two places."""
    for split, *rows in (("train", 8, 0), ("test", 6, 1)):
        data = pictures(*rows)
        places = [("studio", "garden")[number % 2] for number in range(len(data))]
        (tmp_path / "domains").mkdir(exist_ok=True)
        data.add_column("domain", places).to_parquet(tmp_path / "domains" / f"{split}.parquet")
    return str(tmp_path / "domains")


def measured(capsys, *command: str) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_tasks_are_told_to_a_model_that_was_measured_so(train, place, tmp_path, capsys):
    assert train("--scenario.kind", "task-incremental") == 0
    results, out = RunResults.load(tmp_path / "out"), str(tmp_path / "out")
    found = measured(capsys, out, "--dataset", str(place / "data"))
    assert found["tasks"] == pytest.approx(dict(zip(results.task_names, results.accuracy_matrix[-1], strict=True)))
    assert found["task_known"] and found["average_accuracy"] == pytest.approx(results.metrics["average_accuracy"])
    assert main(["evaluate", out, "--dataset", str(place / "data")]) == 0
    assert "20 images, task known" in capsys.readouterr().out


def test_domains_are_told_by_a_column(train, domains, tmp_path, capsys):
    assert train("--dataset", domains, "--scenario", "{kind: domain-incremental}") == 0
    results, out = RunResults.load(tmp_path / "out"), str(tmp_path / "out")
    assert set(results.task_names) == {"garden", "studio"}
    found = measured(capsys, out, "--dataset", domains, "--domain-column", "domain")
    assert found["tasks"] == pytest.approx(dict(zip(results.task_names, results.accuracy_matrix[-1], strict=True)))
    assert found["average_accuracy"] == pytest.approx(results.metrics["average_accuracy"])
    # Without the column the classes, which all domains share, do not tell them.
    assert main(["evaluate", out, "--dataset", domains]) == 0
    text = capsys.readouterr().out
    assert "no task by itself: its tasks share classes" in text and "--domain-column" in text
    assert "garden" not in text and f"{found['accuracy']:.2%}" in text


def test_a_domain_that_was_not_learnt_is_left_out(train, domains, tmp_path, capsys):
    assert train("--dataset", domains, "--scenario", "{kind: domain-incremental, domain_order: [studio]}") == 0
    found = measured(capsys, str(tmp_path / "out"), "--dataset", domains, "--domain-column", "domain")
    assert set(found["tasks"]) == {"studio"} and (found["images"], found["left_out"]) == (12, 12)


def test_a_stream_has_no_tasks(train, place, tmp_path, capsys):
    assert train("--scenario", "{kind: task-free, num_tasks: 2}", "--training.num_train_epochs", "1") == 0
    found = measured(capsys, str(tmp_path / "out"), "--dataset", str(place / "data"))
    assert found["tasks"] is None and "stream" in found["tasks_missing"]


def test_a_column_that_is_not_needed_or_not_there(trained, place, domains, capsys):
    command = ["evaluate", str(trained), "--dataset", domains, "--domain-column", "domain"]
    assert main(command) == 2
    assert "does not need it: each of its classes belongs to one task. Leave it out." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "expected"),
    [("place", "the data has the columns"), ("image", "cannot be used"), ("label", "no image there is of a domain")],
)
def test_a_wrong_domain_column(train, domains, tmp_path, capsys, column, expected):
    words = ("--training.max_steps", "1", "--scenario", "{kind: domain-incremental}")
    assert train("--dataset", domains, *words) == 0
    command = ["evaluate", str(tmp_path / "out"), "--dataset", domains, "--domain-column", column]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"--domain-column is {column!r}" in error and expected in error


@pytest.fixture
def sequence(train, place, tmp_path) -> str:
    """An adapter of two data sets, in which classes have the same names."""
    two = f"{{first: {place / 'data'}, second: {{path: {place / 'single'}, test_fraction: 0.3}}}}"
    assert train("--dataset", two, "--scenario", "{kind: dataset-sequence}") == 0
    return str(tmp_path / "out")


def test_one_data_set_of_a_sequence(sequence, place, capsys):
    results = RunResults.load(sequence)
    whole = (("first", str(place / "data")), ("second", str(place / "single"), "--test-fraction", "0.3"))
    for number, (task, *data) in enumerate(whole):
        found = measured(capsys, sequence, "--task", task, "--dataset", *data)
        assert found["left_out"] == 0 and found["images"] == results.test_sizes[number]
        assert found["accuracy"] == pytest.approx(results.accuracy_matrix[-1][number])
        assert found["tasks"][task] == found["accuracy"] and f"{task}/red" in found["classes"]


def test_a_data_set_of_a_sequence_has_to_be_named(sequence, trained, place, capsys):
    for words, expected in (
        ([sequence], "or --task, one of first, second."),
        ([sequence, "--task", "third"], "--task is 'third', but no class of the adapter bears that name (first/red"),
        ([str(trained), "--task", "first"], "Leave it out."),
    ):
        assert main(["evaluate", *words, "--dataset", str(place / "data")]) == 2
        assert expected in capsys.readouterr().err


def test_the_task_is_identified_as_the_run_counted_it(trained, place, capsys):
    found, results = measured(capsys, str(trained), "--dataset", str(place / "data")), RunResults.load(trained)
    assert found["task_identification"] == pytest.approx(results.task_identification)
    assert found["classes"] == pytest.approx(results.per_class_accuracy)
    assert main(["evaluate", str(trained), "--dataset", str(place / "data")]) == 0
    assert f"task identified   {results.task_identification:8.2%}" in capsys.readouterr().out


def test_forward_transfer_comes_from_a_configuration(train, domains, tmp_path, capsys):
    words = ("--dataset", domains, "--scenario", "{kind: domain-incremental}", "--training.measure_ahead", "true")
    assert train(*words) == 0
    out, results = capsys.readouterr().out, RunResults.load(tmp_path / "out")
    expected = results.accuracy_matrix[0][1] - results.baseline[1]
    assert results.metrics["forward_transfer"] == pytest.approx(expected)
    assert f"forward transfer {expected:.2%}" in out
    assert f"- Forward transfer: {100 * expected:.2f} %" in (tmp_path / "out" / "README.md").read_text()
    assert train(*words, "--scenario", "{num_tasks: 2}", "--output_dir", str(tmp_path / "new")) == 2
    assert "measure_ahead is True, but task 'task_1' brings new classes" in capsys.readouterr().err


def test_a_distilled_deit_is_learnt_on_with_its_one_head(place, tmp_path, capsys):
    """Of its checkpoint the Auto class makes a model with two heads, which cannot be prompted."""
    size = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "num_labels": 3}
    width = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}
    DeiTForImageClassificationWithTeacher(DeiTConfig(**size, **width)).save_pretrained(tmp_path / "deit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "deit")
    out, model = str(tmp_path / "out"), str(tmp_path / "deit")
    words = ["--output_dir", out, "--model.name", model, "--training.num_train_epochs", "1"]
    assert main(["train", str(place / "config.yaml"), *words]) == 0
    assert main(["evaluate", out, "--dataset", str(place / "data")]) == 0
    assert "20 images" in capsys.readouterr().out


def test_what_is_measured_is_chosen_as_in_a_configuration(trained, place, capsys):
    """`--data-files` are those measured on; messages name the options of this command, not settings of a file."""
    files = str(place / "data" / "test*.parquet")
    assert main(["evaluate", str(trained), "--dataset", "parquet", "--data-files", files]) == 0
    assert "20 images" in capsys.readouterr().out
    command = ["evaluate", str(trained), "--dataset", str(place / "data")]
    assert main([*command, "--split", "dev"]) == 2
    assert "Set --split, or --test-fraction, for instance to 0.2" in capsys.readouterr().err
    assert main([*command, "--test-fraction", "0.2", "--train-split", "fit"]) == 2
    assert "Set --train-split." in capsys.readouterr().err
    assert main([*command, "--test-fraction", "0.2", "--train-split", "train"]) == 0
