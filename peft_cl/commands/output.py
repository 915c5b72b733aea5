"""What the command prints: nothing in it that a terminal would obey, whatever names are in it."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, TextIO

from ..text import plain


#: Letters of a warning that are shown.
LONGEST = 4000
#: What a shell has for a process whose reader went away (128 + SIGPIPE).
BROKEN_PIPE = 141


def lines(text: Any) -> str:
    """Return text of several lines, each of them plain."""
    return "\n".join(plain(line, None) for line in str(text).split("\n"))


def say(text: Any, file: TextIO | None = None, flush: bool = False) -> None:
    """Print text, on the standard output by default; letters that it has no code for as escapes."""
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(lines(text).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=flush)


def say_json(value: Any) -> None:
    """Print a value as JSON, in which all that is no ASCII is an escape."""
    say(json.dumps(value, indent=2).replace("\x7f", "\\u007f"))


def complain(error: Any) -> None:
    """Print an error in one line on the standard error."""
    say(f"peft-cl: {error}", sys.stderr)


class _Plain(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = lines(record.getMessage()[:LONGEST]), ()
        return True


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Have warnings and logs, ours and the libraries', in plain lines too while the block runs."""
    libraries = (logging.getLogger(name).handlers for name in ("transformers", "datasets", "peft"))
    handlers = [logging.lastResort, *chain.from_iterable(libraries)]
    usual, seen = warnings.formatwarning, _Plain()
    for handler in handlers:
        handler.addFilter(seen)
    warnings.formatwarning = lambda message, category, *_, **__: (
        f"{category.__name__}: {plain(_for_the_command_line(message), LONGEST)}\n"
    )
    try:
        yield
    finally:
        warnings.formatwarning = usual
        for handler in handlers:
            handler.removeFilter(seen)


def _for_the_command_line(message: object) -> str:
    try:
        from .wording import for_the_command_line
    except ImportError:  # while these modules are loaded
        return str(message)
    return for_the_command_line(str(message))


def leave_pipe() -> int:
    """After the reader of the output has gone: nothing more is written, at the end of Python neither."""
    with suppress(OSError, ValueError):  # ValueError: no file is behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE
