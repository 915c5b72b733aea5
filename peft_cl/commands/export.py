"""`peft-cl export`: a saved adapter with its backbone as one file that runs without this library."""

from __future__ import annotations

import argparse

from ..disk import local_path
from ..exporting import FORMATS, export_adapter, format_of
from ..text import counted, size
from .adapters import SavedAdapter
from .errors import CommandError, explained
from .evaluate import add_model_options, load_adapter, processor_of
from .networks import network_of
from .output import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter, or its name on the Hub")
    parser.add_argument(
        "--output", metavar="FILE", required=True, help=f"the file to write; it ends in {' or '.join(FORMATS)}"
    )
    parser.add_argument("--fixed-batch", action="store_true", help="for one image at a time; default: any number")
    parser.add_argument("--opset", type=int, metavar="N", help="version of the ONNX operators; default: torch's")
    add_model_options(parser, batch_size=False)
    parser.epilog = (
        "The file takes pixel_values (images, channels, height, width) and gives logits. It holds the names of the "
        "classes and the preprocessing as metadata. Before it is in its place, it is run and compared with the model. "
        "An ONNX file is float32, whatever the training was."
    )


def run(arguments: argparse.Namespace) -> None:
    path = local_path(arguments.output)
    with explained(f"The adapter cannot be exported to {arguments.output!r}"):
        kind = format_of(path)
    adapter = SavedAdapter.read(arguments.adapter)
    if network_of(adapter.folder) is not None:
        raise CommandError(
            f"The adapter {adapter.name!r} holds a network for each task, and a file has one. Give an adapter of "
            "another strategy."
        )
    if not adapter.config.tasks:
        raise CommandError("The adapter has learnt no classes yet, so there is nothing to export. Train it first.")
    trust = arguments.trust_remote_code
    dtype = arguments.dtype or ("float32" if kind == "onnx" else adapter.dtype)
    model = load_adapter(adapter, arguments.model, dtype, trust)
    processor = processor_of(adapter, model, trust)
    with explained(f"The adapter cannot be exported to {arguments.output!r}"):
        export_adapter(model, processor, path, dynamic_batch=not arguments.fixed_batch, opset=arguments.opset)
    classes = counted(len(adapter.config.classes), "class")
    say(f"{path}: {size(path.stat().st_size)}, {classes}. It was run, and gives the logits of the model.")
