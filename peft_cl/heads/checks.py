"""Checks of a head's options, with messages that name the option, its value and the rule."""

from __future__ import annotations

from typing import Any

from ..text import brief


#: Above it, sizes do not fit any memory, and numbers not float32.
LARGEST, LARGEST_FLOAT = 10**9, 3e38


def check_number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> float:
    """Refuse what is no finite number, or is below `least`, not above `above`, or over `most`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT
    inside = is_number and (
        (least is None or value >= least) and (above is None or value > above) and (most is None or value <= most)
    )
    if not inside:
        bounds = {"at least": least, "above": above, "at most": most}
        rules = [f"{rule} {bound:g}" for rule, bound in bounds.items() if bound is not None]
        raise ValueError(f"{name} is {brief(value)}, but must be a number{' ' if rules else ''}{' and '.join(rules)}.")
    return value


def check_count(name: str, value: Any, *, or_none: bool = False) -> int | None:
    """Refuse what is no whole number of at least 1 (or None, where that is allowed)."""
    if value is None and or_none:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        none = ", or None" if or_none else ""
        most = f" and at most {LARGEST:,}" if isinstance(value, int) and value > LARGEST else ""
        raise ValueError(f"{name} is {brief(value)}, but must be a whole number of at least 1{most}{none}.")
    return value


def check_choice(name: str, value: Any, choices: tuple) -> Any:
    """Refuse what is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {brief(value)}, but must be one of {', '.join(map(repr, choices))}.")
    return value
