"""Continual-learning metrics of an accuracy matrix.

Everywhere, `R[i, j]` is the accuracy (0 to 1) on the test data of task j after training on task i, both counted from
0: an array of shape (T, T) for T tasks, or nested lists, with `None` or NaN for what was not measured. Row i is
finished when `R[i, 0..i]` is measured. All functions read the first finished rows only, so they also tell about a
sequence that is still under way: the formulas below then hold with T finished tasks. `tasks=T` says how many are
finished where the matrix does not show it, because earlier tasks were not measured after the last ones: a metric that
needs what was not measured is NaN then.

All but `finished_tasks` raise ValueError for a matrix without a finished row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def final_average_accuracy(matrix: ArrayLike, *, tasks: int | None = None) -> float:
    """Mean accuracy over all tasks after the last one: `1/T sum_j R[T-1, j]`.

    "ACC" of Lopez-Paz & Ranzato 2017, "Gradient episodic memory for continual learning", equation 2. Every task counts
    alike, however many test examples it has.

    Example:
        >>> final_average_accuracy([[0.9, None], [0.7, 0.8]])
        0.75
    """
    return float(_finished(matrix, tasks)[-1].mean())


def overall_accuracy(matrix: ArrayLike, test_sizes: Sequence[int], *, tasks: int | None = None) -> float:
    """Accuracy over all test examples after the last task: `sum_j n_j R[T-1, j] / sum_j n_j`.

    Other than the final average accuracy it lets a task with more test examples weigh more.

    Args:
        matrix: The accuracy matrix.
        test_sizes: Number of test examples n_j of each task, whole numbers from 1, shape (T,).

    Example:
        >>> overall_accuracy([[0.9, None], [0.5, 1.0]], [30, 10])
        0.625
    """
    finished, sizes = _finished(matrix, tasks), _of_each_task(test_sizes, matrix, "test_sizes")
    wrong = sizes[~(np.isfinite(sizes) & (sizes >= 1) & (sizes == np.floor(sizes)))]
    if wrong.size:
        raise ValueError(f"test_sizes are whole numbers from 1, got {wrong[0]:g}; count each task's test examples.")
    return float(np.average(finished[-1], weights=sizes[: len(finished)]))


def average_incremental_accuracy(matrix: ArrayLike, *, tasks: int | None = None) -> float:
    """Mean over the steps of the average accuracy so far: `1/T sum_i 1/(i+1) sum_{j<=i} R[i, j]`.

    Rebuffi et al. 2017, "iCaRL: incremental classifier and representation learning", section 4.

    Example:
        >>> average_incremental_accuracy([[0.75, None], [0.25, 0.75]])
        0.625
    """
    return float(np.mean(average_accuracies(matrix, tasks=tasks)))


def average_accuracies(matrix: ArrayLike, *, tasks: int | None = None) -> list[float]:
    """Average accuracy over the tasks so far, after each task: `1/(i+1) sum_{j<=i} R[i, j]`.

    Example:
        >>> average_accuracies([[0.75, None], [0.25, 0.75]])
        [0.75, 0.5]
    """
    finished = _finished(matrix, tasks)
    return [float(finished[step, : step + 1].mean()) for step in range(len(finished))]


def forgetting(matrix: ArrayLike, *, tasks: int | None = None) -> float:
    """Mean loss since the best accuracy: `1/(T-1) sum_{j<T-1} (max_{j<=i<=T-2} R[i, j] - R[T-1, j])`.

    Chaudhry et al. 2018, "Riemannian walk for incremental learning", section 4.2; lower is better, negative if the
    tasks got better. The last task cannot be forgotten yet and does not count; 0.0 for a single task.

    Example:
        >>> forgetting([[0.75, None], [0.5, 0.75]])
        0.25
    """
    return forgetting_so_far(matrix, tasks=tasks)[-1]


def forgetting_so_far(matrix: ArrayLike, *, tasks: int | None = None) -> list[float]:
    """`forgetting` of the tasks so far, after each task.

    Example:
        >>> forgetting_so_far([[0.75, None], [0.5, 0.75]])
        [0.0, 0.25]
    """
    finished = _finished(matrix, tasks)
    learnt = np.tri(len(finished), dtype=bool)  # what was measured ahead does not count
    best = np.maximum.accumulate(np.where(learnt, finished, -np.inf), axis=0)
    drops = [float(np.mean(best[step - 1, :step] - finished[step, :step])) for step in range(1, len(finished))]
    return [0.0, *drops]


def per_step_forgetting(matrix: ArrayLike, *, tasks: int | None = None) -> float:
    """Mean drop from one step to the next: `1/(T-1) sum_{t>=1} 1/t sum_{j<t} (R[t-1, j] - R[t, j])`.

    What the code of CODA-Prompt calls forgetting (Smith et al. 2023, `utils/calc_forgetting.py`). It is about T times
    smaller than `forgetting` and does not compare with it. 0.0 for a single task.

    Example:
        >>> per_step_forgetting([[0.75, None], [0.5, 0.75]])
        0.25
    """
    finished = _finished(matrix, tasks)
    drops = [(finished[step - 1, :step] - finished[step, :step]).mean() for step in range(1, len(finished))]
    return float(np.mean(drops)) if drops else 0.0


def intransigence(matrix: ArrayLike, reference: ArrayLike, *, tasks: int | None = None) -> float:
    """Mean lack of what a reference reaches on a task just learnt: `1/T sum_j (reference[j] - R[j, j])`.

    Chaudhry et al. 2018, section 4.2; the reference is a model trained on all data so far. Lower is better.

    Args:
        matrix: The accuracy matrix.
        reference: Accuracy (0 to 1) of the reference on each task, shape (T,); NaN for a finished task makes the
            result NaN.

    Example:
        >>> intransigence([[0.75, None], [0.5, 0.5]], reference=[0.75, 0.75])
        0.125
    """
    finished = _finished(matrix, tasks)
    reached = _fractions(_of_each_task(reference, matrix, "reference"), "reference")
    return float((reached[: len(finished)] - finished.diagonal()).mean())


def backward_transfer(matrix: ArrayLike, *, tasks: int | None = None) -> float:
    """Mean change since a task was learnt: `1/(T-1) sum_{j<T-1} (R[T-1, j] - R[j, j])`.

    "BWT" of Lopez-Paz & Ranzato 2017, equation 3; higher is better, negative if the tasks were forgotten. 0.0 for a
    single task.

    Example:
        >>> backward_transfer([[0.75, None], [0.5, 0.75]])
        -0.25
    """
    finished = _finished(matrix, tasks)
    last = len(finished) - 1
    if last == 0:
        return 0.0
    return float((finished[last, :last] - finished.diagonal()[:last]).mean())


def forward_transfer(matrix: ArrayLike, baseline: ArrayLike, *, tasks: int | None = None) -> float:
    """Mean gain on a task before it is learnt: `1/(T-1) sum_{j>=1} (R[j-1, j] - baseline[j])`.

    "FWT" of Lopez-Paz & Ranzato 2017, equation 4. It needs what a run measures with `measure_ahead=True` alone: the
    accuracy on every task before its turn, above the diagonal. 0.0 for a single task.

    Args:
        matrix: The accuracy matrix, with `R[j-1, j]` measured.
        baseline: Accuracy (0 to 1) of the untrained model on each task, shape (T,).

    Raises:
        ValueError: An accuracy it needs was not measured, or the baseline has another length or values outside 0 to 1.

    Example:
        >>> forward_transfer([[0.75, 0.5], [0.5, 0.75]], baseline=[0.25, 0.25])
        0.25
    """
    finished = _finished(matrix, tasks)
    start = _fractions(_of_each_task(baseline, matrix, "baseline"), "baseline")
    if len(finished) == 1:
        return 0.0
    gains = finished.diagonal(offset=1) - start[1 : len(finished)]
    if np.isnan(gains).any():
        tasks = (np.flatnonzero(np.isnan(gains)) + 1).tolist()
        raise ValueError(
            f"Forward transfer needs the accuracy on the tasks {tasks} before they are learnt, which is not measured; "
            "evaluate on the next task as well after each one, and give a baseline without NaN."
        )
    return float(gains.mean())


def finished_tasks(matrix: ArrayLike) -> int:
    """Number of leading rows in which every task so far is measured, 0 to T.

    A row in which earlier tasks are missing, but not its own, is that of a task learnt without measuring the others;
    what is counted ends before it.

    Raises:
        ValueError: The matrix is not square, has values outside 0 to 1, or a finished row after one in which not even
            its own task is measured.

    Example:
        >>> finished_tasks([[0.9, None, None], [0.7, 0.8, None], [0.6, None, None]])
        2
    """
    accuracies = _checked(matrix)
    complete = (~np.isnan(accuracies) | ~np.tri(len(accuracies), dtype=bool)).all(axis=1).tolist()
    count = complete.index(False) if False in complete else len(complete)
    if any(complete[count:]) and any(np.isnan(accuracies.diagonal()[count : complete.index(True, count)])):
        raise ValueError(
            f"Row {complete.index(True, count)} of the accuracy matrix is measured, but row {count} is not; "
            "tasks are trained in order, so evaluate after each one."
        )
    return count


def continual_metrics(
    matrix: ArrayLike,
    *,
    test_sizes: Sequence[int] | None = None,
    baseline: ArrayLike | None = None,
    reference: ArrayLike | None = None,
    tasks: int | None = None,
) -> dict[str, float]:
    """Returns the metrics of a run by name.

    Args:
        matrix: The accuracy matrix.
        test_sizes: Number of test examples of each task; adds `overall_accuracy`.
        baseline: Accuracy of the untrained model on each task; adds `forward_transfer`.
        reference: Accuracy of a model trained on all data so far on each task; adds `intransigence`.
        tasks: Number of finished tasks, where the matrix does not show it; `None`: its finished rows.

    Returns:
        `average_accuracy` (the final one, in which each task counts alike), `average_incremental_accuracy`,
        `forgetting`, `per_step_forgetting` and `backward_transfer`, as fractions of 1, of the finished tasks; and what
        the arguments add (`overall_accuracy` counts each test example alike).

    Raises:
        ValueError: No row is finished, the matrix is not one of accuracies, or an argument does not fit it.

    Example:
        >>> continual_metrics([[0.75, None], [0.5, 0.75]])["backward_transfer"]
        -0.25
    """
    metrics = {
        "average_accuracy": final_average_accuracy(matrix, tasks=tasks),
        "average_incremental_accuracy": average_incremental_accuracy(matrix, tasks=tasks),
        "forgetting": forgetting(matrix, tasks=tasks),
        "per_step_forgetting": per_step_forgetting(matrix, tasks=tasks),
        "backward_transfer": backward_transfer(matrix, tasks=tasks),
    }
    further = {
        "overall_accuracy": (overall_accuracy, test_sizes),
        "forward_transfer": (forward_transfer, baseline),
        "intransigence": (intransigence, reference),
    }
    added = {name: (of, values) for name, (of, values) in further.items() if values is not None}
    return metrics | {name: of(matrix, values, tasks=tasks) for name, (of, values) in added.items()}


def _checked(matrix: ArrayLike) -> np.ndarray:
    accuracies = np.array(matrix, dtype=float)  # None becomes NaN
    if accuracies.ndim != 2 or accuracies.shape[0] != accuracies.shape[1]:
        raise ValueError(
            f"An accuracy matrix has one row and one column per task, got shape {accuracies.shape}; "
            "fill what was not measured with NaN."
        )
    return _fractions(accuracies, "accuracy matrix")


def _fractions(accuracies: np.ndarray, name: str) -> np.ndarray:
    outside = accuracies[(accuracies < 0) | (accuracies > 1)]  # NaN is neither
    if outside.size:
        raise ValueError(
            f"Accuracies in the {name} are fractions from 0 to 1, got {outside[0]}; divide percentages by 100."
        )
    return accuracies


def _of_each_task(values: ArrayLike, matrix: ArrayLike, name: str) -> np.ndarray:
    numbers, tasks = np.asarray(values, dtype=float), len(_checked(matrix))
    if numbers.shape != (tasks,):
        raise ValueError(f"{name} has the shape {numbers.shape}, but needs one number per task: ({tasks},).")
    return numbers


def _finished(matrix: ArrayLike, tasks: int | None = None) -> np.ndarray:
    """Returns the finished part, shape (finished, finished); above its diagonal it may hold NaN, and everywhere where
    `tasks` says how many are finished."""
    count = finished_tasks(matrix) if tasks is None else tasks
    if count == 0:
        raise ValueError("No task of the accuracy matrix is finished; evaluate after the first task before asking.")
    return _checked(matrix)[:count, :count]
