"""`--import`: code of the user's own, by which heads, families and strategies get their names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import CommandError, explained


OPTION = "--import"


#: What this process was told to import, such that it holds in any folder: other processes of a command need it too.
IMPORTED: list[str] = []


def import_given(words: Sequence[str]) -> list[str]:
    """Import what a command line names by `--import`, and return its other words.

    Raises:
        CommandError: an `--import` without a name, or of something that is not there or fails.
    """
    rest, names = take_imports(words)
    IMPORTED[:] = import_all(names)
    return rest


def as_words() -> list[str]:
    """The option again, for another process."""
    return [word for name in IMPORTED for word in (OPTION, name)]


def take_imports(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a command line into its other words and what `--import` names.

    Raises:
        CommandError: an `--import` without a name.
    """
    rest, names = [], []
    words = list(words)
    while words:
        word = words.pop(0)
        if word == OPTION or word.startswith(f"{OPTION}="):
            name = word.partition("=")[2] or (words.pop(0) if words else "")
            if not name or name.startswith("--"):
                raise CommandError(f"{OPTION} has no value. Write `{OPTION} FILE.py` or `{OPTION} MODULE`.")
            names.append(name)
        else:
            rest.append(word)
    return rest, names


def import_all(names: Sequence[str]) -> list[str]:
    """Import files and modules by name; returns the names such that they hold in any folder.

    Raises:
        CommandError: there is none, or it fails.
    """
    found = []
    for name in names:
        with explained(f"{OPTION} {name} fails"):
            found.append(str(_import_file(Path(name))) if name.endswith(".py") else _import_module(name))
    return found


def _import_file(path: Path) -> Path:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise CommandError(f"{OPTION} is {str(path)!r}, but there is no such file. Correct the path.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # so that what it defines can be pickled
    spec.loader.exec_module(module)
    return path


def _import_module(name: str) -> str:
    importlib.import_module(name)
    return name
