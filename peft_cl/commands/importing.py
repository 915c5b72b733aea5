"""`--import`: code of the user's own, by which heads, families and strategies get their names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from .errors import CommandError


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
        try:
            found.append(str(_import_file(Path(name))) if name.endswith(".py") else _import_module(name))
        except CommandError:
            raise
        except (Exception, SystemExit) as error:  # whatever a user's code may raise
            raise CommandError(f"{OPTION} {name} fails{_place(error)}: {type(error).__name__}: {error}") from error
    return found


def _place(error: BaseException) -> str:
    """Where in the user's code it was raised, if it got that far."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" in {error.filename}, line {error.lineno}"
    ours = (__file__, importlib.__file__)
    frames = [each for each in traceback.extract_tb(error.__traceback__) if each.filename not in ours]
    own = [each for each in frames if not each.filename.startswith("<")]
    return f" in {own[0].filename}, line {own[0].lineno}" if own else ""


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
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.split(".")[: error.name.count(".") + 1] == error.name.split("."):
            raise CommandError(
                f"{OPTION} is {name!r}, but there is no such module. Give the path of a file that ends with .py, or a "
                "module that Python finds."
            ) from error
        raise
    if getattr(module, "__file__", None) is None:
        raise CommandError(f"{OPTION} is {name!r}, but that is a folder without code. Give a file that ends with .py.")
    return name
