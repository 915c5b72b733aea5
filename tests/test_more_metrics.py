"""What a run measures beside average accuracy and forgetting: ahead of tasks, task by class, class by class."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from trainer_cases import CONFIGS, images

from peft_cl import RunResults, continual_metrics, dataset_sequence, task_free, task_incremental
from peft_cl.metrics import forward_transfer


MATRIX = [[0.8, np.nan, np.nan], [0.9, 0.6, np.nan], [0.5, 0.4, 0.7]]


def record(**fields) -> RunResults:
    """A record of three tasks."""
    defaults = {
        "method": "L2P",
        "peft_type": "L2P",
        "base_model": "owner/backbone",
        "dataset": "owner/images",
        "scenario": {},
        "seed": 0,
        "task_names": ["task_0", "task_1", "task_2"],
        "accuracy_matrix": MATRIX,
        "test_sizes": [50] * 3,
        "metrics": {},
        "trainable_parameters": 1,
        "total_parameters": 2,
        "adapter_bytes": None,
        "train_seconds": 1.0,
        "finished_tasks": 3,
    }
    return RunResults(**{**defaults, **fields})


@pytest.fixture
def shared(data):
    """Three data sets of the same classes, the last one smaller."""
    third = {"train": images(6, 4), "test": images(3, 5)}
    sets = {"a": data, "b": {"train": images(8, 2), "test": images(8, 3)}, "c": third}
    return dataset_sequence(sets, shared_classes=True)


def test_tasks_are_measured_before_they_are_learnt(make_trainer, shared, tmp_path):
    trainer = make_trainer(CONFIGS["l2p"](), scenario=shared, measure_ahead=True, num_train_epochs=4)
    trainer.train()
    results = RunResults.load(tmp_path / "run")
    matrix = np.array(results.accuracy_matrix)
    assert np.isfinite(matrix).all()
    # A head that has not learnt gives one of six classes to every image, or nearly; the data sets are alike.
    assert max(results.baseline) < 0.6 < matrix[0, 1]
    expected = np.mean([matrix[0, 1] - results.baseline[1], matrix[1, 2] - results.baseline[2]])
    assert results.metrics["forward_transfer"] == pytest.approx(expected)
    assert results.metrics == trainer.metrics and results.hyperparameters["measure_ahead"]
    # The average is that of the tasks seen, at each evaluation too.
    averages = [log["eval_average_accuracy"] for log in trainer.state.log_history if "eval_average_accuracy" in log]
    assert averages[-1] == pytest.approx(matrix[2].mean())
    assert trainer.evaluate()["eval_average_accuracy"] == pytest.approx(matrix[2].mean())
    assert len(results.prompt_usage) == 3 and results.usage_metrics()["usage_overlap"] > 0.5


def test_the_average_within_a_sequence_is_that_of_the_tasks_seen(make_trainer, shared):
    trainer = make_trainer(CONFIGS["linear-probe"](), scenario=shared, measure_ahead=True)
    trainer.train_task(shared[0])
    found, row = trainer.evaluate(), trainer.accuracy_matrix[0]
    assert found["eval_average_accuracy"] == row[0] and found["eval_accuracy_c"] == row[2]


def test_a_resumed_run_has_what_was_measured_ahead(make_trainer, shared):
    whole = make_trainer(CONFIGS["coda"](), scenario=shared, measure_ahead=True, folder="whole")
    whole.train()
    first = make_trainer(CONFIGS["coda"](), scenario=shared, measure_ahead=True)
    first.train_task(shared[0])
    resumed = make_trainer(CONFIGS["coda"](), scenario=shared, measure_ahead=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.baseline == whole.baseline and resumed.metrics == whole.metrics
    again = make_trainer(CONFIGS["coda"](), scenario=shared, measure_ahead=True)
    again.resume(again.folder)  # of a finished run nothing is measured anew
    assert again.results.per_class_accuracy == whole.results.per_class_accuracy
    with pytest.raises(ValueError, match="measure_ahead: was True, is None"):
        make_trainer(CONFIGS["coda"](), scenario=shared).train(resume_from_checkpoint=True)


def test_a_task_that_is_added_later_has_no_baseline(make_trainer, shared):
    trainer = make_trainer(CONFIGS["linear-probe"](), scenario=shared, measure_ahead=True, num_train_epochs=1)
    trainer.train()
    assert "forward_transfer" in trainer.metrics
    trainer.train_task({"train": images(4, 6), "test": images(4, 7)}, name="late")
    assert "forward_transfer" not in trainer.metrics and np.isnan(trainer.results.baseline[-1])


def test_a_stream_begins_with_all_classes(make_trainer, data):
    stream = {"num_train_epochs": 1, "lr_scheduler_type": "constant"}
    trainer = make_trainer(CONFIGS["l2p"](), scenario=task_free(data, 3), measure_ahead=True, **stream)
    trainer.train()
    assert np.isfinite(trainer.accuracy_matrix).all() and "forward_transfer" in trainer.metrics
    assert trainer.results.task_identification is None


def test_what_cannot_be_measured_ahead_is_refused(make_trainer, data, tmp_path):
    with pytest.raises(ValueError, match=r"task 'task_1' brings new classes \(blue, yellow\).*Leave measure_ahead at"):
        make_trainer(CONFIGS["l2p"](), measure_ahead=True)
    known = task_incremental(data, 1)
    with pytest.raises(ValueError, match="task 'task_0' is told to the model by its number"):
        make_trainer(CONFIGS["l2p"](), scenario=known, measure_ahead=True)
    with pytest.raises(ValueError, match="measure_ahead is 'no', but must be True or False"):
        make_trainer(CONFIGS["l2p"](), measure_ahead="no")


def test_tasks_are_identified_and_classes_counted(make_trainer, data, tmp_path):
    trainer = make_trainer(CONFIGS["linear-probe"](), eval_strategy="epoch")
    trainer.train()
    results, tasks = RunResults.load(tmp_path / "run"), trainer.scenario
    predicted = [trainer.predict(task).predictions for task in tasks]
    own = [np.isin(rows, [2 * number, 2 * number + 1]) for number, rows in enumerate(predicted)]
    assert results.task_identification == pytest.approx(np.concatenate(own).mean())
    rows, labels = np.concatenate(predicted), np.repeat(np.arange(6), 8)
    by_hand = {name: (rows == labels)[labels == row].mean() for row, name in enumerate(tasks.classes)}
    assert results.per_class_accuracy == pytest.approx(by_hand)
    # Of equal tasks; others are told apart by the two averages.
    assert results.metrics["overall_accuracy"] == pytest.approx(results.metrics["average_accuracy"])


def test_tasks_of_unequal_size_have_two_averages(make_trainer, shared):
    trainer = make_trainer(CONFIGS["linear-probe"](), scenario=shared, num_train_epochs=1)
    trainer.train()
    last, sizes = trainer.accuracy_matrix[-1], np.array([48, 48, 18])
    assert trainer.metrics["average_accuracy"] == pytest.approx(last.mean())
    assert trainer.metrics["overall_accuracy"] == pytest.approx((last * sizes).sum() / sizes.sum())
    assert trainer.results.task_identification is None  # each class is of every task


def test_a_task_that_is_known_is_not_identified(make_trainer, data):
    trainer = make_trainer(CONFIGS["linear-probe"](), scenario=task_incremental(data, 3), num_train_epochs=1)
    trainer.train()
    assert trainer.results.task_identification is None and len(trainer.results.per_class_accuracy) == 6


def test_forward_transfer_of_a_sequence_under_way_is_that_of_its_finished_tasks():
    under_way = [[0.8, 0.3, 0.1], [0.9, 0.6, 0.2], [None, None, None]]
    assert forward_transfer(under_way, [0.1, 0.1, 0.4]) == pytest.approx(0.2)


def test_what_further_arguments_add():
    plain = continual_metrics(MATRIX)
    further = continual_metrics(MATRIX, test_sizes=[10, 10, 20], reference=[0.9] * 3)
    # (0.5 * 10 + 0.4 * 10 + 0.7 * 20) / 40; (0.1 + 0.3 + 0.2) / 3
    assert further.pop("overall_accuracy") == pytest.approx(0.575)
    assert further.pop("intransigence") == pytest.approx(0.2)
    assert further == plain


def test_intransigence_is_what_a_joint_run_reaches_beyond(tmp_path):
    scenario = {"name": "class-incremental", "class_order": ["ant", "bee", "cat"]}
    reached = [[0.9, np.nan, np.nan], [0.8, 0.8, np.nan], [0.1, 0.2, 0.9]]
    joint = record(method="joint", scenario=scenario, accuracy_matrix=reached)
    mine = record(scenario=scenario)
    # its diagonal 0.8, 0.6, 0.7 against 0.9, 0.8, 0.9
    assert mine.intransigence(joint) == pytest.approx((0.1 + 0.2 + 0.2) / 3)
    other = record(scenario={**scenario, "class_order": ["cat", "bee", "ant"]})
    with pytest.raises(ValueError, match="differs from the run in class_order, .*train it on the same scenario"):
        mine.intransigence(other)
    with pytest.raises(ValueError, match="reference has finished 2 tasks, the run 3; let the reference finish"):
        mine.intransigence(dataclasses.replace(joint, finished_tasks=2))


def test_the_use_of_prompts_in_numbers():
    assert record().usage_metrics() == {}
    used = record(prompt_usage=[[1, 1, 0, 0], [0, 1, 1, 0], [2, 0, 0, 0]]).usage_metrics()
    assert used == {"usage_entropy": pytest.approx(2 / 3), "usage_overlap": pytest.approx((0.5 + 0.5 + 0) / 3)}
    single = {"task_names": ["a"], "test_sizes": [5], "accuracy_matrix": [[0.5]], "finished_tasks": 1}
    assert record(**single, prompt_usage=[[1, 1]]).usage_metrics() == {"usage_entropy": 1.0}


def test_what_the_last_evaluation_told_reads_back(tmp_path):
    told = {"baseline": [0.5, np.nan, 0.25], "task_identification": 0.5, "per_class_accuracy": {"ant": 0.25}}
    record(**told).save(tmp_path)
    assert RunResults.load(tmp_path) == record(**told)
    record().save(tmp_path)
    assert not set(told) & set(json.loads((tmp_path / "results.json").read_text()))  # as in older records
    assert RunResults.load(tmp_path) == record()
    with pytest.raises(ValueError, match="baseline has 1 entries, but there are 3 tasks; give"):
        record(baseline=[0.5])
