"""The record of an adapter goes on with it: what a saved one learns later stands behind what it had learnt."""

from __future__ import annotations

import numpy as np
import pytest
from peft import PeftModel
from trainer_cases import CONFIGS, whole_and_resumed

from peft_cl import RunResults, class_incremental, domain_incremental


FIRST, SECOND = ["red", "green", "blue", "yellow"], ["cyan", "magenta"]


@pytest.fixture
def first(make_trainer, data):
    """An adapter in `run` that has learnt two tasks of two classes."""
    trainer = make_trainer(CONFIGS["coda"](), scenario=class_incremental(data, 2, class_order=FIRST))
    trainer.train()
    return trainer


@pytest.fixture
def learn_on(first, make_trainer, tiny_vit, data, tmp_path):
    """`learn_on(...)`: a trainer of the saved adapter on a third task."""

    def make(source="run", classes=SECOND, folder="on", **words):
        model = PeftModel.from_pretrained(tiny_vit(), tmp_path / source, is_trainable=True)
        scenario = words.pop("scenario", None) or class_incremental(data, 1, class_order=classes)
        return make_trainer(None, model=model, scenario=scenario, folder=folder, **words)

    return make


def test_the_record_goes_on(first, learn_on, tmp_path):
    trainer = learn_on()
    trainer.train()
    results = RunResults.load(tmp_path / "on")
    assert results.task_names == ["task_0", "task_1", "task_2"] and results.finished_tasks == 3
    assert results.scenario["class_order"] == FIRST + SECOND == trainer.model.peft_config["default"].classes
    assert results.scenario["num_tasks"] == 3 and results.scenario["classes_per_task"] == [2, 2, 2]
    assert results.test_sizes == results.scenario["test_sizes"] == [16, 16, 16]
    assert results.scenario["train_sizes"] == [32, 32, 32]
    matrix = np.array(results.accuracy_matrix)
    np.testing.assert_array_equal(matrix[:2, :2], first.accuracy_matrix)
    assert np.isnan(matrix[2, :2]).all() and matrix[2, 2] > 0.4


def test_what_was_not_measured_is_said_so(learn_on, tmp_path):
    learn_on().train()
    results = RunResults.load(tmp_path / "on")
    for name in ("average_accuracy", "forgetting", "backward_transfer", "overall_accuracy", "per_step_forgetting"):
        assert np.isnan(results.metrics[name]), name
    card = (tmp_path / "on" / "README.md").read_text()
    assert "- Forgetting: not measured" in card and "Forgetting: 0.00" not in card
    assert results.task_identification is None and "Task identification" not in card
    assert "| Tasks | 3 |" in card and "red, green, blue, yellow, cyan, magenta" in card
    assert "| task_2 | not measured | not measured |" in card


def test_earlier_tasks_are_measured_where_their_images_are_given(first, learn_on, data, tmp_path):
    trainer = learn_on(earlier_test=data["test"])
    trainer.train()
    matrix = np.array(trainer.results.accuracy_matrix)
    assert not np.isnan(matrix[np.tril_indices(3)]).any()
    # By hand: predictions of the images of the first four classes.
    for task in first.scenario:
        correct = trainer.evaluate(task.test)["eval_accuracy"]
        assert correct == matrix[2, task.index]
    expected = np.mean([max(matrix[0, 0], matrix[1, 0]) - matrix[2, 0], matrix[1, 1] - matrix[2, 1]])
    assert trainer.metrics["forgetting"] == pytest.approx(expected)
    assert trainer.metrics["average_accuracy"] == pytest.approx(matrix[2].mean())
    assert set(trainer.results.per_class_accuracy) == {*FIRST, *SECOND}


@pytest.mark.parametrize("form", ["dict", "scenario", "one task"])
def test_forms_of_earlier_images(form, first, learn_on, data):
    given = {
        "dict": {task.name: task.test for task in first.scenario},
        "scenario": first.scenario,
        "one task": {"task_1": first.scenario[1].test},
    }[form]
    trainer = learn_on(earlier_test=given, num_train_epochs=1)
    trainer.train()
    measured = ~np.isnan(trainer.whole_matrix[2])
    assert measured.tolist() == [form != "one task", True, True]
    assert np.isnan(trainer.metrics["average_accuracy"]) == (form == "one task")


def test_a_third_run_goes_on_with_the_record_of_two(learn_on, data, tmp_path):
    learn_on(num_train_epochs=1).train()
    trainer = learn_on("on", ["red", "cyan"], folder="third", earlier_test=None)
    trainer.train()
    results = RunResults.load(tmp_path / "third")
    assert results.task_names == ["task_0", "task_1", "task_2", "task_3"]
    assert results.hyperparameters["num_train_epochs"] == [2, 2, 1, 2]
    assert [task["steps"] for task in results.learnt] == [8, 8, 4, 8]
    assert results.scenario["class_order"] == FIRST + SECOND


def test_the_same_process_goes_on_without_files(first, make_trainer, data):
    scenario = class_incremental(data, 1, class_order=SECOND)
    trainer = make_trainer(None, model=first.model, scenario=scenario, folder="on")
    trainer.train()
    np.testing.assert_array_equal(trainer.whole_matrix[:2, :2], first.accuracy_matrix)


def test_without_a_record_names_and_classes_are_the_adapters(learn_on, tmp_path):
    (tmp_path / "run" / "results.json").unlink()
    trainer = learn_on()
    trainer.train()
    results = RunResults.load(tmp_path / "on")
    assert results.task_names == ["task_0", "task_1", "task_2"] and results.test_sizes == [0, 0, 16]
    assert "train_sizes" not in results.scenario and np.isnan(results.accuracy_matrix[0][0])
    assert "not known, not known, 16" in (tmp_path / "on" / "README.md").read_text()


def test_the_record_of_another_adapter_is_not_taken(learn_on, make_trainer, data, tmp_path):
    scenario = class_incremental(data, 2, class_order=FIRST[::-1])
    make_trainer(CONFIGS["coda"](), scenario=scenario, folder="other", num_train_epochs=1).train()
    (tmp_path / "run" / "results.json").write_bytes((tmp_path / "other" / "results.json").read_bytes())
    assert learn_on().earlier.record is None


def test_a_record_of_an_earlier_version_holds_the_last_run_alone(learn_on, tmp_path):
    learn_on(num_train_epochs=1).train()
    results = RunResults.load(tmp_path / "on")
    results.task_names, results.test_sizes, results.finished_tasks = ["task_0"], [16], 1
    results.accuracy_matrix, results.learnt = [[0.875]], None
    results.scenario |= {"class_order": SECOND, "classes_per_task": [2], "train_sizes": [32], "test_sizes": [16]}
    results.save(tmp_path / "on")
    trainer = learn_on("on", ["red", "cyan"], folder="third")
    assert trainer.earlier.names == ("task_0", "task_1", "task_2") and trainer.scenario[0].name == "task_3"
    assert trainer.whole_matrix[2, 2] == 0.875 and np.isnan(trainer.whole_matrix[:2, :2]).all()


def test_names_that_come_again_are_told_apart(make_trainer, tiny_vit, data, tmp_path):
    def domains():
        splits = {
            name: part.add_column("domain", [str(row % 2) for row in range(len(part))]) for name, part in data.items()
        }
        return domain_incremental(splits)

    make_trainer(CONFIGS["linear-probe"](), scenario=domains(), num_train_epochs=1).train()
    model = PeftModel.from_pretrained(tiny_vit(), tmp_path / "run", is_trainable=True)
    words = {"model": model, "scenario": domains(), "folder": "on", "num_train_epochs": 1}
    with pytest.raises(ValueError, match=r"earlier_test is one data set, but the tasks 0, 1 share classes"):
        make_trainer(None, earlier_test=data["test"], **words)
    trainer = make_trainer(None, earlier_test=domains(), **words)
    trainer.train()
    assert trainer.results.task_names == ["0", "1", "0 (2)", "1 (2)"]
    assert not np.isnan(trainer.whole_matrix[np.tril_indices(4)]).any()


def test_a_loaded_adapter_is_evaluated_before_anything_is_trained(first, learn_on, data):
    last = first.accuracy_matrix[1]
    trainer = learn_on(earlier_test=data["test"])
    found = trainer.evaluate()
    assert [found[f"eval_accuracy_task_{task}"] for task in range(2)] == last.tolist()
    assert found["eval_average_accuracy"] == last.mean()
    same = learn_on(scenario=first.scenario, folder="same")
    assert same.evaluate()["eval_average_accuracy"] == last.mean()
    assert same.evaluate(first.scenario[1])["eval_accuracy"] == last[1]
    assert same.evaluate(data["test"].select(range(32)))["eval_accuracy"] == last.mean()
    with pytest.raises(ValueError, match="no test images of the tasks that the adapter has learnt.*earlier_test"):
        learn_on().evaluate()


def test_the_tasks_as_they_were_given_are_taken(learn_on, data):
    trainer = learn_on(num_train_epochs=1)
    given = trainer._given[0]
    assert given.name == "task_0" and trainer.scenario[0].name == "task_2"
    trainer.train_task(given)
    trainer.train_task({name: part.filter(lambda row: row["label"] == 0) for name, part in data.items()})
    assert trainer.results.task_names[2:] == ["task_2", "task_3"]


def test_an_interrupted_run_of_a_loaded_adapter_goes_on(learn_on, data):
    def trainer(**words):
        scenario = class_incremental(data, 2, class_order=SECOND)
        return learn_on(scenario=scenario, earlier_test=data["test"], num_train_epochs=1, **words)

    whole, again = whole_and_resumed(trainer)
    np.testing.assert_array_equal(again.whole_matrix, whole.whole_matrix)
    assert again.results.learnt == whole.results.learnt


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("rows", TypeError, "earlier_test is a list, but must be a datasets.Dataset"),
        ({"task_9": None}, ValueError, r"earlier_test names 'task_9', but the tasks are task_0, task_1"),
        ("foreign", ValueError, "earlier_test has no image of the tasks task_0, task_1"),
        ("column", ValueError, "There is no column 'label' in the data.*rename_column"),
    ],
)
def test_bad_images_of_earlier_tasks(given, error, message, learn_on, data):
    test = data["test"]
    given = {
        "rows": [1],
        "foreign": test.filter(lambda row: row["label"] > 3),
        "column": test.rename_column("label", "what"),
    }.get(given if isinstance(given, str) else "", given)
    with pytest.raises(error, match=message):
        learn_on(earlier_test=given)


def test_images_of_earlier_tasks_of_an_adapter_that_has_none(make_trainer, data):
    with pytest.raises(ValueError, match="earlier_test is given, but the adapter has learnt no task"):
        make_trainer(CONFIGS["coda"](), earlier_test=data["test"])
