"""The metrics from predictions, by hand and through `evaluate`, which must not need a network."""

from __future__ import annotations

import evaluate
import numpy as np
import pytest

from peft_cl.metrics import (
    MODULE,
    accuracy_matrix,
    class_accuracies,
    forward_transfer,
    intransigence,
    overall_accuracy,
    per_step_forgetting,
    task_identification_accuracy,
)


# Two tasks of classes 0, 1 and 2, 3. After task 0 its three examples are measured; after task 1 all five are.
ROWS = {
    "predictions": [0, 0, 1, 0, 2, 3, 2, 0],
    "references": [0, 0, 1, 0, 0, 1, 2, 3],
    "task_ids": [0, 0, 0, 0, 0, 0, 1, 1],
    "steps": [0, 0, 0, 1, 1, 1, 1, 1],
}
MATRIX = [[0.8, None, None], [0.9, 0.6, None], [0.5, 0.4, 0.7]]


def test_the_matrix_counts_each_tasks_examples():
    expected = [[1.0, np.nan], [1 / 3, 0.5]]
    np.testing.assert_allclose(accuracy_matrix(**ROWS), expected)


def test_other_metrics_by_hand():
    # step 1: 0.8 - 0.9 = -0.1; step 2: ((0.9 - 0.5) + (0.6 - 0.4)) / 2 = 0.3
    assert per_step_forgetting(MATRIX) == pytest.approx((-0.1 + 0.3) / 2)
    assert per_step_forgetting([[0.5]]) == 0
    assert overall_accuracy(MATRIX, [10, 20, 70]) == pytest.approx(0.05 + 0.08 + 0.49)
    assert intransigence(MATRIX, [0.9, 0.9, 0.9]) == pytest.approx((0.1 + 0.3 + 0.2) / 3)
    # of the last step's predictions 0, 2, 3, 2, 0 the first and the fourth are of the right task
    assert task_identification_accuracy(ROWS["predictions"][3:], ROWS["task_ids"][3:], [0, 0, 1, 1]) == 2 / 5
    assert class_accuracies(ROWS["predictions"][3:], ROWS["references"][3:]) == {0: 0.5, 1: 0, 2: 1, 3: 0}


@pytest.mark.parametrize("load", [True, False], ids=["evaluate.load", "class"])
def test_the_module_gives_them_all(load, tmp_path, monkeypatch):
    if load:
        metric = evaluate.load(MODULE, cache_dir=str(tmp_path))
    else:
        from peft_cl.metrics.continual_learning import ContinualLearning

        metric = ContinualLearning(cache_dir=str(tmp_path))
    found = metric.compute(**ROWS, task_of_class=[0, 0, 1, 1], reference=[1.0, 1.0])
    assert found["accuracy_matrix"] == [[1.0, None], [pytest.approx(1 / 3), 0.5]]
    assert found["average_accuracy"] == pytest.approx((1 / 3 + 0.5) / 2)
    assert found["overall_accuracy"] == pytest.approx(2 / 5)
    assert found["average_incremental_accuracy"] == pytest.approx((1 + (1 / 3 + 0.5) / 2) / 2)
    assert found["forgetting"] == found["per_step_forgetting"] == pytest.approx(2 / 3)
    assert found["backward_transfer"] == pytest.approx(-2 / 3)
    assert found["task_identification_accuracy"] == 2 / 5
    assert found["intransigence"] == pytest.approx((0 + 0.5) / 2)
    assert found["task_accuracies"] == [pytest.approx(1 / 3), 0.5]
    assert found["class_accuracies"] == {0: 0.5, 1: 0, 2: 1, 3: 0}


def test_forward_transfer_needs_predictions_from_before(tmp_path):
    metric = evaluate.load(MODULE, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"Forward transfer needs the accuracy on the tasks \[1\]"):
        metric.compute(**ROWS, baseline=[0.25, 0.25])
    before = {"predictions": 2, "references": 2, "task_ids": 1, "steps": 0}
    early = {name: [*column, before[name]] for name, column in ROWS.items()}
    assert metric.compute(**early, baseline=[0.25, 0.25])["forward_transfer"] == 0.75


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"steps": [0]}, "One number per example is needed in each, but the shapes are"),
        ({name: [] for name in ROWS}, "One number per example is needed"),
        ({"task_ids": [0.5] * 8}, "task_ids must be whole numbers from 0"),
        ({"predictions": [-1] * 8}, "predictions must be whole numbers from 0"),
        ({"predictions": [1.7] * 8}, "predictions must be whole numbers from 0, got 1.7; .* no scores"),
        ({"references": [np.nan] * 8}, "references must be whole numbers from 0, got nan"),
        ({"references": ["cat"] * 8}, "references must be whole numbers from 0, got cat"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        accuracy_matrix(**{**ROWS, **columns})


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"test_sizes has the shape \(2,\), but needs one number per task: \(3,\)"):
        overall_accuracy(MATRIX, [1, 2])


@pytest.mark.parametrize(("size", "shown"), [(-1, "-1"), (0, "0"), (1.5, "1.5"), (np.nan, "nan"), (np.inf, "inf")])
def test_sizes_that_count_nothing_are_refused(size, shown):
    with pytest.raises(ValueError, match=f"test_sizes are whole numbers from 1, got {shown}; count"):
        overall_accuracy(MATRIX, [10, size, 10])


@pytest.mark.parametrize("value", [90, -0.1, np.inf])
def test_percentages_are_refused(value):
    with pytest.raises(ValueError, match=f"in the reference are fractions from 0 to 1, got {value}.*by 100"):
        intransigence(MATRIX, [0.9, value, 0.9])
    with pytest.raises(ValueError, match=f"in the baseline are fractions from 0 to 1, got {value}.*by 100"):
        forward_transfer([[0.8, 0.3], [0.9, 0.6]], [0.5, value])


def test_what_no_metric_reads_need_not_be_known():
    assert intransigence([[0.5, None], [None, None]], [0.75, np.nan]) == 0.25
    assert np.isnan(intransigence(MATRIX, [0.9, np.nan, 0.9]))
    assert forward_transfer([[0.75, 0.5], [0.5, 0.75]], [np.nan, 0.25]) == 0.25


@pytest.mark.parametrize("tasks", [[0, 0, 1], {0: 0, 1: 0, 2: 1}, {"0": 0, "1": 0, "2": 1, "3": 1}, 5])
def test_a_class_without_a_task_is_named(tasks, tmp_path):
    missing = 3 if not isinstance(tasks, int) and 0 in tasks else 0
    with pytest.raises(ValueError, match=f"task_of_class has no entry for the class {missing}, .* every class"):
        task_identification_accuracy(ROWS["predictions"], ROWS["task_ids"], tasks)
    with pytest.raises(ValueError, match="task_of_class has no entry for the class"):
        evaluate.load(MODULE, cache_dir=str(tmp_path)).compute(**ROWS, task_of_class=tasks)


def test_the_module_does_not_cut_scores_to_classes(tmp_path):
    metric = evaluate.load(MODULE, cache_dir=str(tmp_path))
    for column in ("predictions", "references"):
        with pytest.raises(ValueError, match=f"{column} must be whole numbers from 0, got 1.7"):
            metric.compute(**{**ROWS, column: [1.7] * 8})
    metric.add(prediction=0.9, reference=0, task_ids=0, steps=0)
    with pytest.raises(ValueError, match=r"got 0\.9"):
        metric.compute()


def test_predictions_on_tasks_not_learnt_yet_count_for_forward_transfer_only(tmp_path):
    metric = evaluate.load(MODULE, cache_dir=str(tmp_path))
    options = {"task_of_class": [0, 0, 1, 1, 2], "reference": [1.0, 1.0, np.nan]}
    expected = metric.compute(**ROWS, **{**options, "reference": [1.0, 1.0]})
    # Task 2 is seen once after task 0, and three times after task 1, which is the last one learnt.
    later = {"predictions": [4, 4, 4, 0], "references": [4] * 4, "task_ids": [2] * 4, "steps": [0, 1, 1, 1]}
    found = metric.compute(**{name: column + later[name] for name, column in ROWS.items()}, **options)
    assert found.pop("accuracy_matrix")[:2] == [[1.0, None, 1.0], [pytest.approx(1 / 3), 0.5, pytest.approx(2 / 3)]]
    expected.pop("accuracy_matrix")
    assert found == expected
    assert found["task_accuracies"] == [pytest.approx(1 / 3), 0.5]


@pytest.mark.parametrize(
    ("steps", "task", "step"),
    [
        ([0, 0, 0, 2, 2, 2, 2, 2], 0, 1),  # a step is left out
        ([1, 1, 1, 1, 1, 1, 1, 1], 0, 0),  # counted from 1
        ([0, 0, 0, 1, 1, 1, 0, 0], 1, 1),  # the last step lacks the task just learnt
    ],
)
def test_a_step_without_predictions_on_a_task_learnt_is_refused(steps, task, step, tmp_path):
    metric = evaluate.load(MODULE, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=f"no predictions on task {task} at step {step}, but the last step is"):
        metric.compute(**{**ROWS, "steps": steps})
