"""Loading what a run is made of: backbone, image processor, data, and an adapter's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Value, load_dataset, load_from_disk
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from peft import PeftConfig
from transformers import AutoImageProcessor, PreTrainedModel

from ..backbones import loader_of
from ..disk import local_path, read_json
from ..hub.fetching import fetch_adapter
from ..hub.sources import EMBEDDED, find_source
from ..hub.usage import PROCESSOR_FILES
from ..metrics import RunResults
from ..scenarios.columns import read_labels
from ..scenarios.pixels import BACKGROUND, WHITE_VALUE
from ..trainer.choosing import share_of_each_class
from ..tuners.base.config import PromptPoolConfig
from ..tuners.base.saved import check_saved_files
from .errors import CommandError, explained
from .folders import lost_zeros, split_patterns, warn_of_left_out, without_labels
from .foreign import check_config, check_pixels, check_weights, no_code_of
from .sections import DatasetSettings


CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
RESULTS_FILE = "results.json"
#: Settings of a data set that `load_dataset` has too.
FROM_LOAD_DATASET = ("name", "revision", "data_dir", "data_files")
#: Names that `load_dataset` reads files by which data_files or data_dir name.
READERS = ("imagefolder", "parquet", "arrow", "webdataset")
WRITTEN_BY_SAVE_TO_DISK = ("dataset_dict.json", "state.json")


def backbone_path(name: str) -> str:
    """Return what `from_pretrained` takes: the folder of an embedded backbone, wherever it was when it was named."""
    source = find_source(name)
    return str(EMBEDDED / source.name) if source.is_embedded else name


def load_backbone(
    name: str, dtype: str, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load an image classifier by Hub name, local folder or the name of an embedded one; code of its own is run only
    where the user says so."""
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    options |= {"trust_remote_code": trust_remote_code, "output_loading_info": True}
    _require_model(name)
    with explained(f"The model {name!r} cannot be loaded"), no_code_of("model", name):
        loader = loader_of(check_config(backbone_path(name), trust_remote_code))
        model, info = loader.from_pretrained(backbone_path(name), dtype=dtype, **options)
        check_weights(model, info["missing_keys"])
    return model


def load_processor(name: str, overrides: dict[str, Any] | None = None, trust_remote_code: bool = False) -> Any:
    """Load an image processor, with some of its settings changed; code of its own is run as `load_backbone` has it."""
    _require_model(name, (*PROCESSOR_FILES, "config.json"))
    with explained(f"The image processor of {name!r} cannot be loaded"), no_code_of("image processor of", name):
        options = {"trust_remote_code": trust_remote_code, **(overrides or {})}
        processor = AutoImageProcessor.from_pretrained(backbone_path(name), **options)
        for option in (BACKGROUND, WHITE_VALUE):  # of ours, which from_pretrained leaves out
            if option in (overrides or {}):
                setattr(processor, option, overrides[option])
        check_pixels(processor)
    return processor


def load_config(folder: Path) -> PromptPoolConfig:
    """Load the configuration of an adapter of ours, whose weight file is whole.

    Raises:
        CommandError: A file is missing or damaged, or the adapter is of another library.
    """
    with explained(f"The adapter in {str(folder)!r} cannot be read"):
        check_saved_files(folder)
        read_json(folder / CONFIG_FILE)  # names the file if it is damaged
        config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, PromptPoolConfig):
        raise CommandError(
            f"The adapter in {str(folder)!r} is of the PEFT type {config.peft_type}, which is none of peft_cl's. Give "
            "the output folder of peft-cl train."
        )
    return config


def load_results(folder: Path) -> RunResults | None:
    """Load the record of the run that wrote an adapter, if there is one beside it."""
    if not os.path.lexists(folder / RESULTS_FILE):
        return None
    with explained("The results beside the adapter cannot be read"):
        return RunResults.load(folder)


def load_data(settings: DatasetSettings) -> DatasetDict | dict[str, Dataset]:
    """Load a data set with its train and test splits, dividing one split where `test_fraction` says so."""
    splits = load_splits(settings)
    if settings.test_fraction is None:
        return splits
    name = settings.train_split if len(splits) > 1 else next(iter(splits))
    if name not in splits:
        raise CommandError(
            f"The data set {settings.path!r} has the splits {list(splits)}, but no {name!r} to take the test fraction "
            "from. Set dataset.train_split."
        )
    with explained(f"The split {name!r} cannot be divided"):
        train, test = divide(splits[name], settings.label_column, settings.test_fraction, settings.split_seed)
    return {settings.train_split: train, settings.test_split: test}


def load_pair(settings: DatasetSettings) -> tuple[Dataset, Dataset]:
    """Load the split to train on and the one to measure on."""
    splits = load_data(settings)
    return split_of(splits, settings, "train_split"), split_of(splits, settings, "test_split")


def split_of(
    splits: Mapping[str, Dataset], settings: DatasetSettings, setting: str, section: str = "dataset"
) -> Dataset:
    """The split of a data set that one of its settings names.

    Raises:
        CommandError: there is none of that name.
    """
    name = getattr(settings, setting)
    if name in splits:
        return splits[name]
    remedy = f"Set {section}.{setting}"
    if setting == "validation_split":
        remedy += " to one of these"
    elif setting == "train_split" and len(splits) == 1:
        remedy = f"Set {section}.test_fraction, for instance to 0.2, to divide the one split"
    else:
        remedy += f", or {section}.test_fraction, for instance to 0.2, to divide one split"
    raise CommandError(f"The data set {settings.path!r} has no split {name!r}; it has {list(splits)}. {remedy}.")


def load_splits(settings: DatasetSettings) -> DatasetDict | dict[str, Dataset]:
    """Load all splits of a Hub data set, a local folder, or a folder that `save_to_disk` wrote."""
    options = {name: value for name in FROM_LOAD_DATASET if (value := getattr(settings, name)) is not None}
    if settings.path not in READERS or not {"data_files", "data_dir"} & set(options):
        _require_folder("data set", settings.path)
    folder = local_path(settings.path)
    _check_place(settings, folder)
    if any((folder / name).is_file() for name in WRITTEN_BY_SAVE_TO_DISK):
        return _load_from_disk(settings, folder, options)
    if folder.is_dir() and settings.revision is not None:
        raise CommandError(
            f"dataset.revision is {settings.revision!r}, but {settings.path!r} is a folder here, which has none. "
            "Leave it out."
        )
    whole, given = folder.is_dir() and not options, options
    if whole and (patterns := split_patterns(folder, settings.label_column)):
        options = {"data_files": patterns}
    with explained(f"The data set {settings.path!r} cannot be loaded"), _told_where(given):
        splits = load_dataset(str(folder) if folder.exists() else settings.path, **options)
    if whole:
        warn_of_left_out(folder, splits)
        if any(Value("int64") == each.features.get(settings.label_column) for each in splits.values()) and (
            lost := lost_zeros(folder, settings.label_column)
        ):
            raise CommandError(
                f"The label {lost} would be read as a number, without its zeros. Write labels that do not look like "
                "numbers, such as class_0062, or make a folder for each class."
            )
    if folder.is_dir() and (fault := without_labels(settings, splits)):
        raise CommandError(fault)
    return splits


def _check_place(settings: DatasetSettings, folder: Path) -> None:
    """Refuse what `datasets` would look for elsewhere, or read as a pattern."""
    if folder.is_file():
        raise CommandError(
            f"dataset.path is {settings.path!r}, but that is a file. Give the folder that it is in; or its kind, one "
            f"of {', '.join(READERS)}, and the file by dataset.data_files."
        )
    if folder.is_dir() and (set("*?[") & set(settings.path) or "::" in settings.path):
        raise CommandError(
            f"dataset.path is {settings.path!r}, but '*', '?', '[' and '::' have meanings of their own in such a path."
            " Rename the folder, or give a link to it without them."
        )


@contextmanager
def _told_where(options: Mapping[str, Any]) -> Iterator[None]:
    """Say of files that were not found by which settings they were looked for."""
    try:
        yield
    except (OSError, ValueError) as error:
        named = " and ".join(f"dataset.{name}" for name in options if name != "revision") or "dataset.path"
        given = f" (with {', '.join(f'{name} {value!r}' for name, value in options.items())})" if options else ""
        hint = " HF_HUB_OFFLINE is set, so nothing is looked for on the Hub." if HF_HUB_OFFLINE else ""
        raise ValueError(f"{error}{given}. Correct {named}.{hint}") from error


def _load_from_disk(settings: DatasetSettings, folder: Path, options: dict[str, Any]) -> dict[str, Dataset]:
    if options:
        raise CommandError(
            f"dataset.{next(iter(options))} is {next(iter(options.values()))!r}, but {settings.path!r} was written by "
            "save_to_disk, and is one data set as it is. Leave it out."
        )
    with explained(f"The data set {settings.path!r} cannot be loaded"):
        loaded = load_from_disk(str(folder))
    return loaded if isinstance(loaded, DatasetDict) else {settings.train_split: loaded}


def divide(split: Dataset, label_column: str, test_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Divide a split into train and test, the same share of each class; a class of two or more is in both.

    Any label column that a scenario reads will do, while `Dataset.train_test_split` needs a `ClassLabel`.
    """
    labels = read_labels(split, split, label_column).train
    is_test = share_of_each_class(labels, test_fraction, seed)
    return split.select(np.flatnonzero(~is_test)), split.select(np.flatnonzero(is_test))


def adapter_folder(name: str) -> Path:
    """Return the folder of an adapter, fetched from the Hub if it is none here.

    Raises:
        CommandError: There is no such folder or repository, or no adapter in it.
    """
    path = local_path(name)
    if not path.exists():
        _require_folder("adapter", name)
        with explained(f"There is no folder {name!r}, and the Hub gives no adapter of that name"):
            path = fetch_adapter(name)
    if path.is_file():
        raise CommandError(f"The adapter is {name!r}, but that is a file. Give the folder that the adapter is in.")
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (path / file).is_file()]
    if missing:
        raise CommandError(
            f"The folder {str(path)!r} is no complete adapter: it has no {' and no '.join(missing)}. Give the output "
            "folder of a run, or a folder that save_pretrained wrote."
        )
    return path


def _require_folder(what: str, name: str) -> None:
    """Refuse a name that can only be a folder, but is none; the libraries' own messages speak of the Hub then."""
    source = find_source(name)
    if source.is_local and not source.is_embedded and not local_path(name).exists():
        raise CommandError(
            f"There is no {what} {name!r}: no such folder here, and a name on the Hub has the form owner/name. "
            "Correct the path."
        )


def _require_model(name: str, files: Sequence[str] = ("config.json",)) -> None:
    """Refuse what is no model, or is not here while nothing is fetched: libraries would speak of another part."""
    _require_folder("model", name)
    place = local_path(backbone_path(name))
    if place.is_file() or (place.is_dir() and not any((place / file).is_file() for file in files)):
        what = "a file" if place.is_file() else f"a folder without a {files[-1]}"
        raise CommandError(
            f"The model is {name!r}, but that is {what}. Give the folder of a model, or its name on the Hub."
        )
    if HF_HUB_OFFLINE and not place.exists():
        _require_cached(name)


def _require_cached(name: str) -> None:
    """Without the Hub, a model must have been downloaded before."""
    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise CommandError(
            f"The model {name!r} is not among those downloaded, and HF_HUB_OFFLINE is set, so it cannot be fetched "
            "from the Hub. Unset HF_HUB_OFFLINE, or give the folder of a model."
        )
