"""`peft-cl export`: a saved adapter with its backbone as one file that runs without this library."""

from __future__ import annotations

import argparse

from ..disk import local_path
from ..exporting import FORMATS, export_adapter, facts_of, format_of
from ..text import counted, size
from .adapters import SavedAdapter
from .errors import CommandError, explained
from .evaluate import add_model_options, load_adapter
from .networks import network_of
from .output import say
from .sources import load_processor


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
    processor = load_processor(
        adapter.processor or model.get_base_model().config._name_or_path, trust_remote_code=trust
    )
    with explained(f"The adapter cannot be exported to {arguments.output!r}"):
        export_adapter(model, processor, path, dynamic_batch=not arguments.fixed_batch, opset=arguments.opset)
    count = len(facts_of(model, processor)["classes"])
    say(
        f"{path}: {size(path.stat().st_size)}, {counted(count, 'class')}. It was run, and gives the logits of the "
        "model."
    )
