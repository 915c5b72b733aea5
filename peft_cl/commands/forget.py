"""`peft-cl forget`: a copy of a saved adapter that does not know some of its classes."""

from __future__ import annotations

import argparse

from ..text import counted
from .errors import CommandError, explained, unknown
from .made import MADE, add_made_options, free_folder, load_source, processor_of, read_source, short_name, write_made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter, or its name on the Hub")
    parser.add_argument("classes", metavar="CLASS", nargs="+", help="names of classes that it has learnt")
    add_made_options(parser)
    parser.epilog = (
        "ADAPTER stays as it is: remove it where the classes must be gone. On frozen features nothing of the classes "
        "is left in the new adapter; prompts were learnt with their images and stay. lda and ridge forget where their "
        "sums are kept class by class (head_options by_class)."
    )


def run(arguments: argparse.Namespace) -> None:
    output, adapter = free_folder(arguments.output), read_source(arguments.adapter)
    for name in arguments.classes:
        if name not in adapter.config.classes:
            raise unknown("class", name, adapter.config.classes)
    if len(set(arguments.classes)) == len(adapter.config.classes):
        raise CommandError("All classes would be forgotten, and nothing be left. Train a new adapter instead.")
    processor = processor_of(adapter, arguments)
    model = load_source(adapter, arguments, MADE, is_trainable=True)
    with explained("The classes cannot be forgotten"):
        model.base_model.forget_classes(list(dict.fromkeys(arguments.classes)))
    # The card does not say which: that would be a trace.
    count = counted(len(set(arguments.classes)), "class")
    write_made(model, processor, output, f"Made of {short_name(adapter)} without {count}.")
