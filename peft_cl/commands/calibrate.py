"""`peft-cl calibrate`: fit the temperature of a saved adapter on held-out images, and write it into the adapter."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from peft import PeftModel

from ..disk import local_path, read_json, replacing
from ..plots.reliability import plot_reliability
from ..plots.run import RELIABILITY_FILE
from ..reliability.calibration import CALIBRATION_FILE, Calibration
from ..reliability.fitting import fit_calibration
from ..text import counted, percent, rounded
from ..trainer.extras import spared
from ..tuners.base.formats import format_needed
from .adapters import SavedAdapter
from .data_options import add_data_options, data_settings
from .errors import CommandError, explained, refuse_below_one, some
from .evaluate import add_model_options, load_networks
from .learnt_images import LearntImages, learnt_images
from .output import say, say_json
from .own_split import TEST, TRAINING, own_split
from .sections import DatasetSettings
from .sources import CONFIG_FILE, load_data, split_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter, which the temperature goes into")
    add_data_options(parser, required=("test_split",))
    parser.add_argument(
        "--domain-column", metavar="NAME", help="column of the domains, where tasks share their classes"
    )
    parser.add_argument(
        "--task", metavar="NAME", help="task that the data set was in a dataset-sequence, whose classes bear its name"
    )
    add_model_options(parser)
    parser.add_argument(
        "--measure-on-all",
        action="store_true",
        help="measure on all images the temperature fitted on them, which looks a little too good, and not on one "
        "half the one fitted on the other half",
    )
    parser.add_argument("--no-pictures", action="store_true", help=f"draw no {RELIABILITY_FILE}")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.epilog = (
        "The images must be of the classes learnt, and neither training nor test images. In evaluation, logits are "
        f"divided by the temperature from then on: predictions stay the same. {CONFIG_FILE} gets the temperature; "
        f"{CALIBRATION_FILE} and {RELIABILITY_FILE} are written beside it."
    )


def run(arguments: argparse.Namespace) -> None:
    refuse_below_one("--batch-size", arguments.batch_size)
    if not local_path(arguments.adapter).exists():
        raise CommandError(
            f"There is no folder {arguments.adapter!r}, and the temperature is written into the adapter's folder. "
            "Correct the path; of an adapter on the Hub, load a copy into a folder of yours, and give that."
        )
    adapter, settings = SavedAdapter.read(arguments.adapter), data_settings(arguments)
    examples = split_of(load_data(settings), settings, "test_split")
    trust = arguments.trust_remote_code
    model, of_task = load_networks(adapter, arguments.model, arguments.dtype or adapter.dtype, trust)
    known = learnt_images(
        model,
        adapter,
        examples,
        settings,
        arguments.domain_column,
        arguments.task,
        trust,
        task_networks=of_task is not None,
    )
    warn_of_images(adapter, settings, known)
    logits = known.ask(
        without_temperature(model),
        of_task and (lambda number: without_temperature(of_task(number))),
        arguments.batch_size,
        lambda logits: logits.float(),
    )
    with explained("The temperature cannot be fitted"):
        calibration = fit_calibration(logits, known.truth, measure_on_half=not arguments.measure_on_all)
    with explained(f"The temperature cannot be written into {str(adapter.folder)!r}"):
        write_temperature(adapter, calibration.temperature)
        calibration.save(adapter.folder / CALIBRATION_FILE)
    written = [CONFIG_FILE, CALIBRATION_FILE]
    if not arguments.no_pictures:
        with spared(f"No reliability diagram in {adapter.folder}"):
            heading = f"{adapter.config.title}, {settings.test_split} images: reliability"
            plot_reliability(calibration, heading, adapter.folder / RELIABILITY_FILE)
            written.append(RELIABILITY_FILE)
    if arguments.json:
        facts = {"adapter": str(adapter.folder), "dataset": settings.path, "split": settings.test_split}
        say_json({**facts, "left_out": known.left_out, **calibration.to_dict()})
    else:
        say(described(calibration, adapter, settings, known.left_out, written))


def without_temperature(model: PeftModel) -> PeftModel:
    """The model, whose logits are as the head gives them."""
    model.peft_config[model.active_adapter].temperature = 1.0
    return model


def write_temperature(adapter: SavedAdapter, temperature: float) -> None:
    """Write the temperature into the adapter's configuration, of which all else stays as it is."""
    path = adapter.folder / CONFIG_FILE
    facts = read_json(path)
    adapter.config.temperature = temperature
    version = max(facts.get("format_version", 1), format_needed(adapter.config))
    with replacing(path) as aside:
        aside.write_text(
            json.dumps({**facts, "temperature": temperature, "format_version": version}, indent=2, sort_keys=True)
        )


def described(
    calibration: Calibration, adapter: SavedAdapter, settings: DatasetSettings, left_out: int, written: list[str]
) -> str:
    """The temperature, and a table of what it changes."""
    before, after, images = calibration.before, calibration.after, calibration.images
    measured = f"measured on {counted(after.images, 'image')}"
    if calibration.held_out:
        measured += f", with a temperature fitted on the other {images - after.images:,}"
    rows: list[tuple[str, Callable[[Any], str]]] = [
        ("NLL", lambda measures: rounded(measures.nll, 4)),
        ("calibration error", lambda measures: f"{percent(measures.ece, 2)}%"),
        ("accuracy", lambda measures: f"{percent(measures.accuracy, 2)}%"),
    ]
    lines = [
        f"{adapter.folder} on {settings.path}, {settings.test_split}: {counted(images, 'image')}",
        *([f"left out: {counted(left_out, 'image')} of classes or domains not learnt"] if left_out else []),
        "",
        f"temperature {rounded(calibration.temperature, 4)}, fitted on {'all of them' if images > 1 else 'it'}",
        "",
        f"{'':<17}  {'before':>8}  {'after':>8}",
        *(f"{name:<17}  {text(before):>8}  {text(after):>8}" for name, text in rows),
        f"({measured})",
        "",
        f"{', '.join(written)} are in {adapter.folder}.",
    ]
    return "\n".join(lines)


def warn_of_images(adapter: SavedAdapter, settings: DatasetSettings, known: LearntImages) -> None:
    """Say where a temperature that is fitted on these images will not be what it seems."""
    lacking = np.setdiff1d(np.arange(len(adapter.config.classes)), known.truth)
    if lacking.size:
        warnings.warn(
            f"{lacking.size} of the {len(adapter.config.classes)} classes learnt have no image here "
            f"({some([adapter.config.classes[row] for row in lacking])}): the temperature is fitted without them. "
            "Give images of all classes.",
            stacklevel=2,
        )
    own = own_split(adapter.results, settings, len(known.truth))
    if own == TEST:
        warnings.warn(
            f"The split {settings.test_split!r} is the adapter's own test split on record: fitted on test images, the "
            "temperature makes the calibration of the test look better than it is. Give other images, such as a "
            "validation split.",
            stacklevel=2,
        )
    if own == TRAINING:
        warnings.warn(
            f"The split {settings.test_split!r} is the adapter's own training split on record, of whose images the "
            "model is surer than of others: the temperature will be too low. Give other images, such as a validation "
            "split.",
            stacklevel=2,
        )
