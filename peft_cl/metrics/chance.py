"""What an accuracy is compared with: guessing, the same tasks without prompts, the chance of the test images."""

from __future__ import annotations

import math

import numpy as np

from ..text import percent
from .matrix import finished_tasks
from .results import RunResults


def chance_level(results: RunResults) -> float | None:
    """Average accuracy of a guess among the classes in question, each as likely: 1 over their number.

    Where the task of an image is known (`task-incremental`) these are the classes of its task, and else all classes
    of the tasks finished.

    Returns:
        A fraction of 1; `None` where the record does not say how many classes there are, or no task is finished.

    Example:
        >>> chance_level(RunResults.load("out"))    # of ten classes
        0.1
    """
    counts, done = results.scenario.get("classes_per_task"), results.finished_tasks
    if not counts or not done or len(counts) < done or min(counts) < 1:
        return None
    if results.scenario.get("name") == "task-incremental":
        return float(np.mean([1 / count for count in counts[:done]]))
    classes = results.scenario.get("class_order") or ()
    shared = sum(counts) != len(classes)  # tasks of the same classes
    return 1 / (len(classes) if shared and classes else sum(counts[:done]))


def standard_error(results: RunResults) -> float | None:
    """Standard error of the final average accuracy, from the number of test images alone.

    `sqrt(sum_j a_j (1 - a_j) / n_j) / T` for accuracies a_j on the n_j test images of T tasks: how far the figure
    would move with other test images. Other seeds and orders of classes move it too, and are not in it.

    Returns:
        A fraction of 1; `None` where no task is finished.

    Example:
        >>> standard_error(RunResults.load("out"))    # 0.5 on 100 images of one task
        0.05
    """
    done = min(finished_tasks(results.accuracy_matrix), results.finished_tasks)
    if not done or min(results.test_sizes[:done]) < 1:
        return None
    accuracies, sizes = np.array(results.accuracy_matrix[done - 1][:done]), np.array(results.test_sizes[:done])
    return math.sqrt(np.sum(accuracies * (1 - accuracies) / sizes)) / done


def compared_without_prompts(results: RunResults) -> str | None:
    """A sentence that compares the run with its row without prompts; `None` where that was not measured.

    Example:
        >>> compared_without_prompts(RunResults.load("out"))
        "Without prompts, LDA of the frozen model's features gives 69.4 %: the run is 2.8 points above."
    """
    row, accuracy = results.without_prompts, results.metrics.get("average_accuracy")
    if not row or not row["accuracies"] or accuracy is None or math.isnan(accuracy):
        return None
    alone = float(np.mean(row["accuracies"]))
    points = percent(abs(accuracy - alone))
    where = f"{points} points {'above' if accuracy > alone else 'below'}"
    if float(points) == 0:
        where = "level with it"
    return (
        f"Without prompts, {row['head']} of the frozen model's features gives {percent(alone)} %: the run is {where}."
    )
