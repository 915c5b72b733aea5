"""`peft-cl split`: take tasks out of a saved adapter into one of their own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..text import plain
from ..tuners.base.joining import split_adapter
from .errors import CommandError, explained, unknown
from .made import MADE, add_made_options, free_folder, load_source, processor_of, read_source, short_name, write_made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter, or its name on the Hub")
    parser.add_argument(
        "--tasks", metavar="NAME[,NAME]", nargs="+", required=True, help="tasks to take out (peft-cl info names them)"
    )
    add_made_options(parser)
    parser.epilog = (
        "ADAPTER stays as it is. Where all tasks share the prompts, the new adapter has all of them. It can learn on "
        "where the sums of the head are kept class by class: nearest class means, or head_options by_class."
    )


def run(arguments: argparse.Namespace) -> None:
    output, adapter = free_folder(arguments.output), read_source(arguments.adapter)
    names = adapter.names_of_tasks
    tasks = find_tasks(arguments.tasks, names)
    processor = processor_of(adapter, arguments)
    model = load_source(adapter, arguments, "source")
    with explained("The adapter cannot be divided"):
        split_adapter(model, "source", tasks, MADE)
    chosen = ", ".join(plain(names[task]) for task in tasks)
    write_made(model, processor, output, f"Taken out of {short_name(adapter)}: {chosen}.")


def find_tasks(given: Sequence[str], names: Sequence[str]) -> list[int]:
    """Numbers of the tasks that the user names, in order.

    Raises:
        CommandError: There is no such task, or one is named twice.
    """
    wanted = [part for word in given for part in ([word] if word in names else word.split(",")) if part]
    for name in wanted:
        if name not in names:
            raise unknown("task", name, names)
    if not wanted or len(set(wanted)) < len(wanted):
        raise CommandError(f"--tasks is {' '.join(given)!r}, but must name one or more tasks, each once.")
    return sorted(list(names).index(name) for name in wanted)
