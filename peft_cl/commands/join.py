"""`peft-cl join`: make of several saved adapters one that knows the classes of all, without training and without
data."""

from __future__ import annotations

import argparse

from ..tuners.base.joining import WAYS, check_settings, join_adapters
from .adapters import SavedAdapter
from .errors import CommandError, explained
from .made import (
    MADE,
    add_made_options,
    free_folder,
    has_own_backbone,
    load_source,
    processor_of,
    read_source,
    short_name,
    write_made,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapters", metavar="ADAPTER", nargs="+", help="folders of two or more adapters, or their names on the Hub"
    )
    parser.add_argument(
        "--prompts",
        choices=WAYS,
        help="apart: an image takes the prompts of one of the adapters; together: rows of all are chosen from, or "
        "added up (default: apart where the method has keys for it)",
    )
    add_made_options(parser)
    parser.epilog = (
        "The adapters must have been learnt on one backbone with the same settings. Heads that are computed from sums "
        "need the file of sums beside each adapter. The new adapter has no record of a run: measure it by peft-cl "
        "evaluate."
    )


def run(arguments: argparse.Namespace) -> None:
    if len(arguments.adapters) < 2:
        raise CommandError(
            f"One adapter is given, {arguments.adapters[0]!r}, but joining takes two or more. Name the others too."
        )
    output = free_folder(arguments.output)
    adapters = [read_source(name) for name in arguments.adapters]
    check_sources(adapters)
    processor = common_processor(adapters, arguments)
    names = [f"source {number}" for number in range(len(adapters))]
    model = load_source(adapters[0], arguments, names[0])
    with explained("Nothing is joined"):
        for adapter, name in zip(adapters[1:], names[1:], strict=True):
            model.load_adapter(str(adapter.folder), name)
        join_adapters(model, names, MADE, prompts=arguments.prompts)
    sources = [short_name(adapter) for adapter in adapters]
    write_made(model, processor, output, f"Joined from {', '.join(sources[:-1])} and {sources[-1]}.")


def check_sources(adapters: list[SavedAdapter]) -> None:
    """Refuse adapters that cannot be joined, before a backbone is loaded."""
    folders = [adapter.folder.resolve() for adapter in adapters]
    if len(set(folders)) < len(folders):
        raise CommandError("An adapter is given twice. Name each once.")
    beside = next((adapter.name for adapter in adapters if has_own_backbone(adapter)), None)
    if beside is not None:
        raise CommandError(
            f"The adapter {beside!r} has a backbone of its own beside it, which was trained with it. Join adapters on "
            "one frozen backbone."
        )
    for other in adapters[1:]:
        with explained("Nothing is joined"):
            check_settings(adapters[0].name, adapters[0].config, other.name, other.config)


def common_processor(adapters: list[SavedAdapter], arguments: argparse.Namespace):
    """The image processor of all the adapters.

    Raises:
        CommandError: They differ.
    """
    processors = [processor_of(adapter, arguments) for adapter in adapters]
    first = processors[0].to_dict()
    for adapter, processor in zip(adapters[1:], processors[1:], strict=True):
        other = processor.to_dict()
        differ = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if differ:
            raise CommandError(
                f"The image processors of {adapters[0].name!r} and {adapter.name!r} differ ({', '.join(differ)}), so "
                "the two see different pixels. Join adapters that were trained with one processor."
            )
    return processors[0]
