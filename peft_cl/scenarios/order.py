"""The order in which classes or domains come, as the user gives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .columns import check_seed, is_count, is_list


def given_order(
    entries: Sequence[str] | Sequence[int], names: tuple[str, ...], trained: np.ndarray, argument: str, kind: str
) -> np.ndarray:
    """Returns the ids of the entries, int64.

    Args:
        entries: Names or ids, without repeats.
        names: Name of each id.
        trained: Whether an id has training examples.
        argument: Name of the user's argument, for messages.
        kind: What an entry is, `"class"` or `"domain"`, for messages.

    Raises:
        ValueError: No list, no entries, or unknown, repeated or untrained ones.
    """
    if not is_list(entries) or not len(entries):
        raise ValueError(
            f"{argument} is {entries!r}, but must be a list of at least one name or id. Leave it out for every {kind}."
        )
    id_of_name = {name: number for number, name in enumerate(names)}
    order, unknown = [], []
    _refuse_ambiguous(entries, id_of_name, argument, kind)
    for entry in entries:
        if isinstance(entry, str) and entry in id_of_name:
            order.append(id_of_name[entry])
        elif is_count(entry, 0) and entry < len(names):
            order.append(int(entry))
        else:
            unknown.append(entry)
    if unknown:
        known = f"{list(names[:10])}{' ...' if len(names) > 10 else ''}"
        raise ValueError(
            f"{argument} has entries that the data set does not have: {unknown}{_hint(unknown)}; "
            f"give names out of {known} or ids from 0 to {len(names) - 1}."
        )
    repeated = [names[number] for number, count in Counter(order).items() if count > 1]
    if repeated:
        raise ValueError(f"{argument} has {repeated} more than once, but a {kind} belongs to one task; list it once.")
    untrained = [names[number] for number in order if not trained[number]]
    if untrained:
        raise ValueError(f"{argument} has {untrained}, but the train split has no examples of them; leave them out.")
    return np.array(order, dtype=np.int64)


def _refuse_ambiguous(entries: Sequence[Any], id_of_name: Mapping[str, int], argument: str, kind: str) -> None:
    """Refuses a number that is the id of one class and the name of another."""
    for entry in entries:
        name = str(entry)
        if is_count(entry, 0) and id_of_name.get(name, entry) != entry and entry < len(id_of_name):
            other = next(each for each, number in id_of_name.items() if number == entry)
            raise ValueError(
                f"{argument} has {name}, which is the name of the {kind} {name!r}, and the id of the {kind} {other!r}."
                f" Give names as text, {name!r} or {other!r} (in a configuration in quotes)."
            )


def _hint(unknown: Sequence[Any]) -> str:
    """What a reader of YAML may have made of a name."""
    is_name = all(isinstance(entry, str) for entry in unknown)
    return "" if is_name else " (names that look like numbers or truth values are given as text, in quotes)"


def drawn_order(ids: np.ndarray, seed: int | None) -> np.ndarray:
    """Returns the ids in an order drawn from the seed, or as they are without one.

    Raises:
        ValueError: The seed is no whole number of at least 0.
    """
    return ids if seed is None else np.random.default_rng(check_seed("seed", seed)).permutation(ids)
