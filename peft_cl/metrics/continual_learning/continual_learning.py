"""The metrics of a task sequence as an `evaluate` module; it loads without a network.

metric = evaluate.load(peft_cl.metrics.MODULE)
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

from peft_cl.metrics import (
    accuracy_matrix,
    class_accuracies,
    continual_metrics,
    overall_accuracy,
    task_identification_accuracy,
)


DESCRIPTION = """\
Metrics of continual learning over a sequence of tasks, from the predictions on the test examples of all tasks seen,
made after each task: final average accuracy, average incremental accuracy, forgetting, backward transfer and more.
"""

INPUTS = """\
Args:
    predictions: predicted class of each test example, at each time it was measured; a whole number, no scores.
    references: its true class.
    task_ids: the task that it belongs to, from 0.
    steps: the task that was learnt last when it was measured, from 0. Every step from 0 to the last one needs
        predictions on every task learnt so far; those on a task not learnt yet count for `forward_transfer` only.
    task_of_class: task of each class, as a list or dict; adds `task_identification_accuracy`, of the last step.
    baseline: accuracy of the untrained model on each task; adds `forward_transfer`, which needs predictions on each
        task from before it was learnt.
    reference: accuracy of a model trained on all data so far on each task; adds `intransigence`.
Returns:
    accuracy_matrix: nested lists, `None` where nothing was measured.
    average_accuracy: mean over the tasks learnt, after the last step. overall_accuracy: over their test examples.
    average_incremental_accuracy, forgetting (mean of best - last), per_step_forgetting (the CODA-Prompt code's),
    backward_transfer.
    task_accuracies, class_accuracies: of the tasks learnt, after the last step.
Raises:
    ValueError: a step lacks predictions on a task learnt by then, or numbers that are not what they should be.
Examples:
    >>> metric = evaluate.load(peft_cl.metrics.MODULE)
    >>> rows = {"predictions": [0, 0, 1], "references": [0, 0, 1], "task_ids": [0, 0, 1], "steps": [0, 1, 1]}
    >>> metric.compute(**rows)["average_accuracy"]
    1.0
"""

CITATION = """\
@inproceedings{chaudhry2018riemannian,
  title={Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence},
  author={Chaudhry, Arslan and Dokania, Puneet K. and Ajanthan, Thalaiyasingam and Torr, Philip H. S.},
  booktitle={ECCV}, year={2018}}
@inproceedings{lopezpaz2017gradient,
  title={Gradient Episodic Memory for Continual Learning},
  author={Lopez-Paz, David and Ranzato, Marc'Aurelio}, booktitle={NeurIPS}, year={2017}}
"""


class ContinualLearning(evaluate.Metric):
    """See `DESCRIPTION` and `INPUTS`; made by `evaluate.load`, or as it is."""

    def _info(self):
        columns = ("predictions", "references", "task_ids", "steps")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            # As int64 a score of 1.7 would be cut to class 1 without a word; here it arrives, and is refused.
            features=datasets.Features({name: datasets.Value("float64") for name in columns}),
        )

    def _compute(self, predictions, references, task_ids, steps, task_of_class=None, baseline=None, reference=None):
        matrix = accuracy_matrix(predictions, references, task_ids, steps)
        predicted, true, tasks, after = (
            np.array(column, dtype=int) for column in (predictions, references, task_ids, steps)
        )
        learnt = _learnt(matrix, after.max())
        final = (after == after.max()) & (tasks < len(learnt))
        predicted, true, tasks = predicted[final], true[final], tasks[final]
        found = {
            "accuracy_matrix": [[None if value != value else value for value in row] for row in matrix.tolist()],
            **continual_metrics(matrix, baseline=baseline, reference=reference),
            "overall_accuracy": overall_accuracy(learnt, np.bincount(tasks)),
            "task_accuracies": learnt[-1].tolist(),
            "class_accuracies": class_accuracies(predicted, true),
        }
        if task_of_class is not None:
            found["task_identification_accuracy"] = task_identification_accuracy(predicted, tasks, task_of_class)
        return found


def _learnt(matrix, last):
    """The part of the matrix up to the last step, without gaps: a sequence under way may lack tasks, but no step."""
    learnt = matrix[: last + 1, : last + 1]
    gaps = np.argwhere(np.isnan(learnt) & np.tri(len(learnt), dtype=bool))
    if len(gaps):
        step, task = gaps[0]
        raise ValueError(
            f"There are no predictions on task {task} at step {step}, but the last step is {last}; after each task "
            "predict the test examples of all tasks learnt so far, and count steps and tasks from 0."
        )
    return learnt
