"""Numbers that a user gives a strategy, checked when it is made."""

from __future__ import annotations

from ..scenarios.columns import is_count, is_number, plain


def check_number(
    name: str,
    value: object,
    example: float,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    or_none: bool = False,
) -> float | None:
    """The number that was given as `name`, in a type that JSON knows.

    Raises:
        ValueError: it is no finite number, or outside the bounds (nor None, where that is allowed).

    Example:
        >>> check_number("decay", 2, 0.95, least=0, most=1)
        Traceback (most recent call last):
        ValueError: decay is 2, but must be a number of at least 0 and at most 1. Give one such as 0.95.
    """
    if value is None and or_none:
        return None
    fits = is_number(value) and abs(value) < float("inf")
    fits = fits and (least is None or value >= least) and (above is None or value > above)
    if not fits or (below is not None and value >= below) or (most is not None and value > most):
        bounds = {"of at least": least, "above": above, "below": below, "at most": most}
        rules = " and ".join(f"{rule} {bound:g}" for rule, bound in bounds.items() if bound is not None)
        raise ValueError(f"{name} is {value!r}, but must be a number {rules}. Give one such as {example:g}.")
    return plain(value)


def check_count(name: str, value: object, example: int, or_none: bool = False) -> int | None:
    """The whole number that was given as `name`, in a type that JSON knows.

    Raises:
        ValueError: it is no whole number of at least 1 (nor None, where that is allowed).
    """
    if value is None and or_none:
        return None
    if not is_count(value):
        raise ValueError(f"{name} is {value!r}, but must be a whole number of at least 1. Give one such as {example}.")
    return plain(value)
