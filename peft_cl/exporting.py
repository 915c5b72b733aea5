"""A trained adapter with its backbone as one file that runs without this library: ONNX, or torch's own."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from .disk import local_path, replacing
from .scenarios import ImageTransform
from .scenarios.pixels import check_background, options_of
from .version import __version__


#: Ending of a file -> format, and what has to be installed for it.
FORMATS = {".onnx": ("onnx", ("onnxscript", "onnxruntime")), ".pt2": ("pt2", ())}
#: Largest difference of a logit between the file and the model, as a share of the largest logit where that is above 1.
TOLERANCE = 1e-3
#: Bytes of an ONNX file: Protobuf has no larger message.
MOST_ONNX = 2**31 - 2**24
#: Settings of an image processor that say how an image becomes `pixel_values`.
PREPROCESSING = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
#: Name of the facts beside a program in a `.pt2` file.
FACTS_FILE = "peft_cl.json"


class Program(nn.Module):
    """The model as it is exported: `pixel_values` (B, C, H, W) in, logits (B, classes) out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


def export_adapter(
    model: Any,
    processor: Any,
    path: str | Path,
    *,
    format: str | None = None,
    dynamic_batch: bool = True,
    opset: int | None = None,
) -> Path:
    """Write the active adapter with its backbone into one file, for inference without this library.

    The program takes `pixel_values` (B, C, H, W) and gives logits (B, classes), with everything that the adapter does
    in evaluation: both passes, the choice of prompts by the image, the head, the task evidence and the temperature.
    Before the file takes its place, it is run on images of noise, and its logits are compared with the model's.

    The file says what is needed around it, each as JSON: `classes` (the names of the logits), `tasks` (rows of the
    classes of each), `preprocessing` (size, mean, standard deviation ... of the image processor), `temperature`
    (divided out of the logits already), `method` and `peft_cl` (the version). In ONNX they are the metadata
    (`session.get_modelmeta().custom_metadata_map`), in a `.pt2` file the extra file `peft_cl.json`.

    Args:
        model: A `PeftModel` with one of this library's adapters, which has learnt classes.
        processor: The image processor that it was learnt with.
        path: The file to write; one that is there is replaced.
        format: `"onnx"`, or `"pt2"` (`torch.export`); `None`: as the ending of `path` says.
        dynamic_batch: Whether the program takes any number of images; otherwise it takes one.
        opset: Version of the ONNX operators; `None`: torch's default.

    Returns:
        The path.

    Raises:
        ValueError: An adapter without classes, an ending or a format that is not known, a backbone that ONNX has no
            program for (16-bit, larger than 2 GB), or a file whose logits are not the model's.
        ImportError: `onnxscript` or `onnxruntime` is missing: `pip install "peft-cl[onnx]"`.
        OSError: The file cannot be written.

    Example:
        >>> export_adapter(model, processor, "pets.onnx")                                  # doctest: +SKIP
        >>> session = onnxruntime.InferenceSession("pets.onnx")                            # doctest: +SKIP
        >>> classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])   # doctest: +SKIP
    """
    path = local_path(path)
    kind = format_of(path, format)
    if opset is not None and (kind != "onnx" or not isinstance(opset, int) or opset < 18):
        raise ValueError(
            f"opset is {opset!r}, but must be a whole number of at least 18, of an ONNX file. Leave it out: torch "
            "knows the one it writes best."
        )
    facts = facts_of(model, processor)
    if kind == "onnx":
        _check_fits_onnx(model)
    images = _images(processor)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.touch()  # a folder that cannot be written to is found before the work
        with _ready(model):
            images = images.to(next(model.parameters()))
            run = WRITERS[kind](Program(model), images, aside, facts, dynamic_batch, opset)
            _compare(model, images if dynamic_batch else images[:1], run)
    return path


def format_of(path: Path, format: str | None = None) -> str:
    """The format of a file to write, `"onnx"` or `"pt2"`, once all is there that it needs.

    Raises:
        ValueError, ImportError: as `export_adapter`.
    """
    formats = dict(FORMATS.values())
    if format is not None and format not in formats:
        raise ValueError(f"format is {format!r}, but must be one of {', '.join(map(repr, formats))}.")
    if format is None:
        if path.suffix.lower() not in FORMATS:
            raise ValueError(
                f"The file {str(path)!r} does not end in {' or '.join(FORMATS)}, so its format is not known. Give it "
                "one of these endings: .onnx for ONNX, .pt2 for torch.export."
            )
        format = FORMATS[path.suffix.lower()][0]
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder. Name a file in it.")
    missing = [package for package in formats[format] if find_spec(package) is None]
    if missing:
        raise ImportError(
            f'To write ONNX {" and ".join(missing)} must be installed: `pip install "peft-cl[onnx]"`. A .pt2 file '
            "needs nothing more."
        )
    return format


def facts_of(model: Any, processor: Any) -> dict[str, Any]:
    """What belongs to the exported program, as `export_adapter` lists it: no path and no name of a machine."""
    config = model.peft_config[model.active_adapter]
    if not config.tasks:
        raise ValueError("The adapter has learnt no classes yet, so there is nothing to export. Train it first.")
    inner = getattr(processor, "image_processor", processor)
    said = inner.to_dict() if hasattr(inner, "to_dict") else vars(inner)
    steps = {name: said[name] for name in PREPROCESSING if name in said}
    pixels = options_of(inner)
    return {
        "classes": list(config.classes),
        "tasks": config.tasks,
        "preprocessing": {**steps, "background": check_background(pixels["background"]), "white": pixels["white"]},
        "temperature": config.temperature,
        "method": config.method,
        "peft_cl": __version__,
    }


def _check_fits_onnx(model: nn.Module) -> None:
    dtypes = {value.dtype for value in model.parameters() if value.is_floating_point()}
    if dtypes != {torch.float32}:
        raise ValueError(
            f"The model is {', '.join(sorted(map(str, dtypes)))}, but an ONNX file runs on CPUs in float32. Load the "
            "backbone with dtype=torch.float32, or write a .pt2 file."
        )
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if size > MOST_ONNX:
        raise ValueError(
            f"The model has {size / 1e9:.1f} GB, but an ONNX file has at most 2. Write a .pt2 file in its place."
        )


def _images(processor: Any) -> torch.Tensor:
    """Five images of noise, each of another colour, so that prompts that are chosen by the image differ."""
    drawn = np.random.default_rng(0)
    colours = drawn.integers(0, 256, (5, 1, 1, 3))
    noise = drawn.integers(-80, 81, (5, 64, 64, 3))
    pixels = (colours + noise).clip(0, 255).astype("uint8")
    return ImageTransform(processor)([Image.fromarray(each) for each in pixels])


@contextmanager
def _ready(model: Any) -> Iterator[None]:
    """The model in evaluation mode, searching keys in a way that a program can; afterwards as it was. What torch says
    meanwhile is of its own inside, and of what is undone here."""
    config, was_training = model.peft_config[model.active_adapter], model.training
    head, log = model.base_model.head, logging.getLogger("torch.onnx")
    search = getattr(config, "search", None)
    model.eval()
    if search is not None:
        config.search = "exact"
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        model.train(was_training)
        head.forget_rows()  # what a traced call leaves behind has no numbers
        head.last_selected = head.last_weights = None
        if search is not None:
            config.search = search


def _compare(model: nn.Module, images: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Run the file on one image and on all of them."""
    for batch in (images[:1], images):
        expected, found = Program(model)(batch).float().cpu(), run(batch).float().cpu()
        error = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
        if not error <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ValueError(
                f"The exported program's logits differ from the model's by {error:.2g} for {len(batch)} images, so no "
                "file was written. Try the other format, or another version of torch or onnxruntime, and report it."
            )


def _captured(program: Program, images: torch.Tensor, dynamic_batch: bool) -> torch.export.ExportedProgram:
    example = images[:2] if dynamic_batch else images[:1]  # a size of 1 would become a constant
    sizes = {"pixel_values": {0: torch.export.Dim("batch", min=1)}} if dynamic_batch else None
    captured = torch.export.export(program.eval(), (example,), dynamic_shapes=sizes)
    for part in captured.graph_module.modules():
        for node in getattr(getattr(part, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # names files of this machine
    return captured


def _write_pt2(
    program: Program, images: torch.Tensor, path: Path, facts: dict[str, Any], dynamic_batch: bool, opset: None
) -> Callable[[torch.Tensor], torch.Tensor]:
    captured = _captured(program, images, dynamic_batch)
    torch.export.save(captured, path, extra_files={FACTS_FILE: json.dumps(facts)})
    return torch.export.load(path).module()


def _write_onnx(
    program: Program, images: torch.Tensor, path: Path, facts: dict[str, Any], dynamic_batch: bool, opset: int | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    written = torch.onnx.export(
        _captured(program, images, dynamic_batch),
        dynamo=True,
        opset_version=opset,
        input_names=["pixel_values"],
        output_names=["logits"],
        verbose=False,
    )
    written.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    written.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(batch: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"pixel_values": batch.cpu().numpy()})[0])

    return run


WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2}
