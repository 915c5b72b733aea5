"""The order in which classes or domains come, as the user gives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


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
        ValueError: Unknown, repeated or untrained entries.
    """
    if isinstance(entries, str):
        raise ValueError(f"{argument} is the single text {entries!r}; give a list of names or ids.")
    id_of_name = {name: number for number, name in enumerate(names)}
    order, unknown = [], []
    for entry in entries:
        if isinstance(entry, str) and entry in id_of_name:
            order.append(id_of_name[entry])
        elif isinstance(entry, (int, np.integer)) and 0 <= entry < len(names):
            order.append(int(entry))
        else:
            unknown.append(entry)
    if unknown:
        known = f"{list(names[:10])}{' ...' if len(names) > 10 else ''}"
        raise ValueError(
            f"{argument} has entries that the data set does not have: {unknown}; "
            f"give names out of {known} or ids from 0 to {len(names) - 1}."
        )
    repeated = [names[number] for number, count in Counter(order).items() if count > 1]
    if repeated:
        raise ValueError(f"{argument} has {repeated} more than once, but a {kind} belongs to one task; list it once.")
    untrained = [names[number] for number in order if not trained[number]]
    if untrained:
        raise ValueError(f"{argument} has {untrained}, but the train split has no examples of them; leave them out.")
    return np.array(order, dtype=np.int64)
