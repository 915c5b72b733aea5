"""What of an adapter's folder is shared: the adapter and what tells of it, checked, without places on this machine.

Of a run's folder nothing else leaves the machine: no state, no checkpoints, no logs, no arguments of the Trainer.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import AutoImageProcessor

from ..assets.resolving import BESIDE
from ..disk import check_file, read_json
from ..heads.files import SUMS_FILE
from ..metrics import RunResults
from ..metrics.results import FILE_NAME
from ..plots.run import PICTURE_FILES
from ..reliability.calibration import CALIBRATION_FILE
from ..text import brief
from ..tuners.base.config import PromptPoolConfig
from ..tuners.base.saved import check_saved_files, read_header
from .cleaned import cleaned_config, cleaned_record, shared_base
from .shared_card import CARD, shared_card
from .usage import PROCESSOR_FILES


#: Folders beside an adapter whose backbone was trained along with it: the backbone, and its LoRA for itself.
WITH_BACKBONE = (BESIDE, "lora")
#: Files that are this library's, by name: where a new version of an adapter has none, the old one goes.
OWN_FILES = (SUMS_FILE, FILE_NAME, CALIBRATION_FILE, *PICTURE_FILES)
GIVE_BASE = "Name the backbone as it is on the Hub: push_adapter(..., base_model=...), peft-cl push --model."
PNG = b"\x89PNG\r\n\x1a\n"

#: Path in the repository -> a file on this machine, or what is sent in its place.
Files = dict[str, Path | bytes]


def fits_adapter(config: PromptPoolConfig, results: RunResults) -> bool:
    """Whether a record can be of the run that taught the adapter. A run that went on with an adapter, or joined two,
    tells of some of its tasks only."""
    counts = results.scenario.get("classes_per_task")
    if results.peft_type not in (None, config.peft_type.value):
        return False
    if config.stream or not isinstance(counts, list) or config.num_tasks != results.finished_tasks:
        return True
    return [len(rows) for rows in config.tasks or ()] == counts[: config.num_tasks]


def files_to_share(
    folder: Path, repo_id: str, base_model: str | None = None, sums: bool = True
) -> tuple[Files, PromptPoolConfig]:
    """Read and check an adapter's folder, and return what is pushed of it.

    Args:
        folder: The folder of a run, or one that `save_pretrained` wrote.
        repo_id: The name that the adapter gets on the Hub.
        base_model: Name of its backbone on the Hub, where the adapter names a folder of this machine.
        sums: Whether the sums of the head are among them.

    Returns:
        The files by their path in the repository, and the adapter's configuration.

    Raises:
        ValueError: there is no adapter, or a file is damaged or of another adapter; the message names it.
    """
    place = adapter_in(folder)
    config, facts = _read_config(place)
    _check_numbers(place / SAFETENSORS_WEIGHTS_NAME)
    trained = facts.get("base_model_name_or_path") == BESIDE
    if trained and base_model:
        raise ValueError(
            f"base_model is {base_model!r}, but the backbone was trained with this adapter and is shared beside it. "
            "Leave base_model= out."
        )
    files: Files = {CONFIG_NAME: as_json(cleaned_config(facts, base_model))}
    for name, path in _files_of_adapter(folder, place, trained):
        if name == SUMS_FILE and not sums:
            continue
        _check_place(path, folder)
        if path.suffix == ".safetensors":
            read_header(path)
        # LoRA in a trained backbone has a configuration of its own, which names the base model too.
        files[name] = as_json(cleaned_config(read_json(path))) if path.name == CONFIG_NAME else path
    if not base_model and not trained:
        _warn_of_folder(facts.get("base_model_name_or_path"))
    files |= _processor(folder, str(folder / BESIDE) if trained else base_model or config.base_model_name_or_path)
    results = _read_record(folder, config)
    if results is not None:
        results = cleaned_record(results if sums else replace(results, sums_bytes=None), base_model)
        files[FILE_NAME] = _as_file(results)
    files |= _pictures(folder)
    if (folder / CARD).is_file():
        _check_place(folder / CARD, folder)
    return files | shared_card(folder / CARD, config, results, repo_id, base_model, set(files)), config


def as_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


def adapter_in(folder: Path) -> Path:
    """Where the adapter lies: in the folder, or below it under a name of its own, as PEFT saves those with one."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}. Give the folder of a run, or of a saved adapter.")
    if (folder / CONFIG_NAME).is_file():
        return folder
    below = [path.parent for path in folder.glob(f"[!_.]*/{CONFIG_NAME}") if path.parent.name not in WITH_BACKBONE]
    if len(below) != 1:
        found = f"several: {brief(sorted(path.name for path in below))}" if below else "none"
        raise ValueError(
            f"{str(folder)!r} must hold one adapter ({CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}), but there is "
            f"{found}. Give the folder of the adapter itself."
        )
    return below[0]


def _read_config(place: Path) -> tuple[PromptPoolConfig, dict[str, Any]]:
    check_saved_files(place)
    if not (place / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{str(place)!r} is no complete adapter: it has no {SAFETENSORS_WEIGHTS_NAME}. Save the adapter again."
        )
    facts = read_json(place / CONFIG_NAME)
    config = PeftConfig.from_pretrained(str(place))
    if not isinstance(config, PromptPoolConfig):
        raise ValueError(
            f"The adapter in {str(place)!r} is of the PEFT type {config.peft_type}, which is none of peft_cl's. Use "
            "its own push_to_hub."
        )
    return config, facts


def _check_numbers(path: Path) -> None:
    with safe_open(path, framework="pt") as weights:
        spoilt = [name for name in weights.keys() if not weights.get_tensor(name).isfinite().all()]  # noqa: SIM118
    if spoilt:
        raise ValueError(
            f"{str(path)!r} has numbers that are not finite (NaN or infinite) in {brief(sorted(spoilt))}: every "
            "prediction would be a guess. Train the adapter anew, or restore the file."
        )


def _files_of_adapter(folder: Path, place: Path, trained: bool) -> Iterator[tuple[str, Path]]:
    """The weights and all that lies beside them in the same format; the backbone where it was trained as well."""
    for path in sorted(place.glob("*.safetensors")):
        if trained or not path.name.startswith("model"):
            yield path.name, path
    if (folder / CALIBRATION_FILE).is_file():
        read_json(folder / CALIBRATION_FILE)
        yield CALIBRATION_FILE, folder / CALIBRATION_FILE
    if not trained:
        return
    if not (folder / BESIDE / "config.json").is_file():
        raise ValueError(
            f"The backbone was trained with this adapter, but there is no folder {BESIDE!r} in {str(folder)!r}. Copy "
            "it there from where the adapter was trained."
        )
    beside = [path for name in WITH_BACKBONE for path in sorted((folder / name).glob("*"))]
    for path in [*sorted(place.glob("config.json")), *sorted(place.glob("model*.json")), *beside]:
        if path.suffix in (".json", ".safetensors"):
            yield path.relative_to(place if path.parent == place else folder).as_posix(), path


def _check_place(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of the folder: what it leads to was not meant. Downloads of the Hub are links."""
    check_file(path, most=2**60)
    target = path.resolve()
    if folder.resolve() not in target.parents and target.parent.name != "blobs":
        raise ValueError(
            f"{str(path)!r} is a link to {str(target)!r}, outside of the folder that is shared. Put the file itself "
            "in its place."
        )


def _warn_of_folder(name: str | None) -> None:
    shared = shared_base(name)
    if not name:
        warnings.warn(
            f"The adapter names no base model, so others must know which to load it on. {GIVE_BASE}",
            stacklevel=4,
        )
    elif shared != name and shared.startswith("path/"):
        warnings.warn(
            f"The adapter's base model is a folder of this machine, {Path(name).name!r}, which others do not have; "
            f"it is shared as {shared!r}. {GIVE_BASE}",
            stacklevel=4,
        )


def _processor(folder: Path, base: str | None) -> Files:
    """The image processor that the adapter was learnt with; that of its base model where it has none of its own."""
    found: Files = {}
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            _check_place(folder / name, folder)
            read_json(folder / name)
            found[name] = folder / name
    if found or not base:
        return found
    with tempfile.TemporaryDirectory() as aside:
        try:
            AutoImageProcessor.from_pretrained(base).save_pretrained(aside)
        except Exception as error:  # whatever the files of others lead to
            warnings.warn(
                f"No image processor is shared: {folder.name!r} has none, and that of {Path(base).name!r} cannot be "
                f"loaded ({' '.join(str(error).split())[:200]}). Save it into the folder by its save_pretrained.",
                stacklevel=3,
            )
            return {}
        return {name: Path(aside, name).read_bytes() for name in PROCESSOR_FILES if Path(aside, name).is_file()}


def _read_record(folder: Path, config: PromptPoolConfig) -> RunResults | None:
    if not (folder / FILE_NAME).is_file():
        return None
    results = RunResults.load(folder)
    if not fits_adapter(config, results):
        raise ValueError(
            f"The {FILE_NAME} in {str(folder)!r} tells of other tasks than the adapter has learnt. Put the record of "
            "its own run there, or remove the file."
        )
    return results


def _as_file(results: RunResults) -> bytes:
    with tempfile.TemporaryDirectory() as aside:
        return results.save(Path(aside, FILE_NAME)).read_bytes()


def _pictures(folder: Path) -> Files:
    found: Files = {}
    for name in PICTURE_FILES:
        path = folder / name
        if path.is_file():
            _check_place(path, folder)
            with path.open("rb") as stream:
                if stream.read(len(PNG)) != PNG:
                    raise ValueError(
                        f"{str(path)!r} is no picture (PNG). Draw it anew with peft-cl plot, or remove it."
                    )
            found[name] = path
    return found
