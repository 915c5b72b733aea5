"""Files on disk: written whole or not at all, never through a link; read where they are files of a size that fits."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


#: Bytes that a file of text (a configuration, a record, a card) may have: far more than any of ours, and what a
#: machine reads without noticing.
MOST_TEXT = 64 * 2**20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the block ends; after an error `path` is as it was.

    What is at `path` is replaced, not written into: if it is a link, a pipe or a device, what is behind it stays.

    Example:
        >>> with replacing(Path("card.md")) as aside:    # doctest: +SKIP
        ...     aside.write_text("# Card")
    """
    aside = temporary(path)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """A name beside `path`, with its ending, that no other process has, on this machine or another."""
    return path.with_name(f".{secrets.token_hex(8)}.tmp{path.suffix}")


def local_path(name: str | Path) -> Path:
    """The path of a name; `~` is the user's folder. A name that begins with `~` and is no user's stays as it is."""
    return Path(os.path.expanduser(name))


def check_file(path: Path, most: int = MOST_TEXT) -> None:
    """Refuse to read what would not end: a pipe, a device, or more bytes than a file of its kind has.

    Raises:
        ValueError: it names the path, and says what it is. A path where nothing is passes: opening it says so.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is no regular file, and was not read. Put the file itself in its place.")
    size = path.stat().st_size if path.exists() else 0
    if size > most:
        raise ValueError(
            f"{str(path)!r} has {size:,} bytes, but such a file has at most {most:,}: it was not read. It is damaged, "
            "or no file of ours; restore it."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The values by name in a file of JSON.

    Raises:
        ValueError: it is no file, too large, or no JSON of that kind; the message names it.
    """
    check_file(path)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}). Restore it.") from error
