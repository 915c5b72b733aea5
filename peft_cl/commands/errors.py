"""Faults in what the user gave are said in one line; faults of the program keep their traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from datasets.exceptions import DatasetGenerationError, DatasetsError
from safetensors import SafetensorError

from ..text import MOST, brief, plain


#: Of what a library says of an input: some say all of it.
INPUT_FAULTS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    OSError,
    ImportError,
    RuntimeError,
    DatasetsError,
    SafetensorError,
)


#: Letters of a message. What is longer loses its middle, as the fault comes first and the remedy last.
LONGEST = 4000


class CommandError(Exception):
    """Something in the command or its files is wrong; the message, one line, names it, the rule and the remedy."""

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 3 :]}"
        super().__init__(plain(message, None))


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn the faults that libraries find in the user's input, while the block runs, into a `CommandError`.

    Only input is read and checked in such blocks: a fault in training itself keeps its traceback.

    Args:
        what: What was tried, the first words of the message.
    """
    try:
        yield
    except CommandError:
        raise
    except INPUT_FAULTS as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:  # which says nothing itself
            text = f"{text}: {error.__cause__}"
        text = " ".join(text.split())
        raise CommandError(f"{what}: {text or type(error).__name__}") from error


def unknown(what: str, name: object, known: Iterable[str], prefix: str = "") -> CommandError:
    """Make the error for a name that is not known: with the nearest one, and all there are.

    Args:
        what: The kind of thing the name stands for.
        name: What was given.
        known: What could have been given.
        prefix: What stands before each of the names, for instance `"training."`.
    """
    names, name = sorted(known), name if isinstance(name, str) and len(name) <= MOST else brief(name)
    nearest = difflib.get_close_matches(name, names, n=1)
    guess = f" Did you mean {prefix}{nearest[0]}?" if nearest else ""
    return CommandError(f"There is no {what} {prefix}{name}.{guess} Known: {', '.join(names) or 'none'}.")


def some(names: Sequence[str]) -> str:
    """List the first names of what may be many."""
    return ", ".join(map(plain, names[:5])) + (", ..." if len(names) > 5 else "")


def refuse_below_one(option: str, value: int) -> None:
    """Refuse a number of an option that is not at least 1."""
    if value < 1:
        raise CommandError(f"{option} is {value}, but must be at least 1.")
