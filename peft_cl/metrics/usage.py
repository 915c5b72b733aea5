"""How a pool's rows are used: from counts of the rows chosen for each task's test images.

Everywhere, `counts[j][r]` says how often row r of the pool was chosen for test images of task j, both counted from 0:
an array of shape (tasks, rows) or nested lists. An image may choose several rows, so a task's counts need not sum to
its number of images.

All functions raise ValueError for counts that are not a table of finite numbers from 0 with one or more rows of the
pool, and for a task without any count: it has no shares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def usage_shares(counts: ArrayLike) -> np.ndarray:
    """Share of each row in the choices for each task: `counts[j, r] / sum_r counts[j, r]`.

    Returns:
        (tasks, rows), 0 to 1; each task's shares sum to 1.

    Example:
        >>> usage_shares([[3, 1], [0, 2]])
        array([[0.75, 0.25],
               [0.  , 1.  ]])
    """
    table = checked_counts(counts)
    return table / table.sum(axis=1, keepdims=True)


def usage_entropy(counts: ArrayLike) -> np.ndarray:
    """Entropy of each task's shares p in bits: `-sum_r p[j, r] log2 p[j, r]`.

    0 where one row is chosen for all images of a task, log2(rows) where all rows are chosen equally often; 2 to its
    power is the number of rows that would give it if they were chosen equally often.

    Returns:
        (tasks,), 0 to log2(rows).

    Example:
        >>> usage_entropy([[1, 1, 1, 1], [2, 2, 0, 0], [5, 0, 0, 0]])
        array([2., 1., 0.])
    """
    shares = usage_shares(counts)
    # A row that is never chosen adds nothing: p log p goes to 0 with p. Adding 0.0 turns -0.0 into 0.0.
    return -np.sum(shares * np.log2(np.where(shares > 0, shares, 1.0)), axis=1) + 0.0


def usage_overlap(counts: ArrayLike) -> np.ndarray:
    """What each two tasks' shares p have in common: `sum_r min(p[i, r], p[j, r])`.

    1 where two tasks choose the same rows equally often (and for a task with itself), 0 where no row serves both.

    Returns:
        (tasks, tasks), 0 to 1, symmetric.

    Example:
        >>> usage_overlap([[3, 1, 0], [1, 3, 0], [0, 0, 4]])
        array([[1. , 0.5, 0. ],
               [0.5, 1. , 0. ],
               [0. , 0. , 1. ]])
    """
    shares = usage_shares(counts)
    return np.stack([np.minimum(shares, task).sum(axis=1) for task in shares])


def selection_diversity(counts: ArrayLike) -> float:
    """How evenly all tasks together choose among the rows: the entropy of all choices over that of an even choice.

    Returns:
        0 (one row is chosen for every image) to 1 (all rows equally often); 0 for a pool of one row.

    Example:
        >>> selection_diversity([[2, 2, 0, 0], [0, 0, 2, 2]]), selection_diversity([[5, 0]])
        (1.0, 0.0)
    """
    table = checked_counts(counts)
    rows = table.shape[1]
    return float(usage_entropy(table.sum(axis=0)[None])[0] / np.log2(rows)) if rows > 1 else 0.0


def usage_density(counts: ArrayLike) -> float:
    """Share of the pool that a task uses: 2 to the power of its entropy, over the number of rows; mean over tasks.

    Returns:
        1 / rows (each task chooses one row) to 1 (each task chooses all rows equally often).

    Example:
        >>> usage_density([[2, 2, 0, 0], [0, 0, 0, 9]])
        0.375
    """
    table = checked_counts(counts)
    return float(np.mean(2 ** usage_entropy(table)) / table.shape[1])


def checked_counts(counts: ArrayLike) -> np.ndarray:
    """Return the counts as a float array, (tasks, rows).

    Raises:
        ValueError: They are none, as the module's first lines say.
    """
    try:
        table = np.array(counts, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Counts of chosen rows must be numbers, as many for each task ({error}); give 0 for a row that was never "
            "chosen."
        ) from error
    if table.ndim != 2 or not table.size:
        raise ValueError(
            f"Counts of chosen rows have the shape {table.shape}, but need (tasks, rows), at least one of each; for a "
            "single task put its counts into a list."
        )
    wrong = table[~(np.isfinite(table) & (table >= 0))]
    if wrong.size:
        raise ValueError(f"Counts of chosen rows are finite numbers from 0, got {wrong[0]}; count again.")
    (empty,) = np.nonzero(table.sum(axis=1) == 0)
    if empty.size:
        raise ValueError(
            f"No row was chosen for task {empty[0]}, so it has no shares; give the counts of tasks that have test "
            "images and were measured."
        )
    return table
