"""How many rows a pool should begin with."""

from __future__ import annotations

from ...heads.checks import check_count


#: In the place of a number: as the rule says for the scenario.
AUTO = "auto"


def suggested_pool_size(num_tasks: int, num_classes: int) -> int:
    """The rule of thumb of the specification's section 7: max(2 T, T C / 5, 10).

    Two prompts for each task, or one for five classes, and ten at least.

    Args:
        num_tasks: T.
        num_classes: classes of all tasks, T C.

    Raises:
        ValueError: One of them is no whole number of at least 1.

    Example:
        >>> suggested_pool_size(10, 100), suggested_pool_size(10, 200)
        (20, 40)
    """
    check_count("num_tasks", num_tasks)
    check_count("num_classes", num_classes)
    return max(2 * num_tasks, num_classes // 5, 10)
