"""Where a result comes from: names, settings and versions, for the record of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

from ..scenarios import Scenario, Task
from ..scenarios.columns import SPLIT_NAMES
from ..scenarios.overlap import StoredImages
from ..tuners.base.formats import added
from ..version import __version__


#: Training arguments that shape the result.
RECORDED = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "learning_rates",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim_args",
    "dataloader_drop_last",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "load_best_model_at_end",
)
#: Those that are seldom at work: by what is measured within a task and kept for it, by draws that come again, ...
MEASURING = (
    "max_grad_norms",
    "eval_strategy",
    "eval_steps",
    "metric_for_best_model",
    "greater_is_better",
    "full_determinism",
    "augmentation_draws",
    "fit_temperature",
)
#: Names of what reads files of a kind, which say nothing about the data.
BUILDERS = set(_PACKAGED_DATASETS_MODULES)
#: Images of a split that stand for all of them.
LOOKED_AT = 8


def hyperparameters(args: Any, model: Any, config: Any, augmentation: Any) -> dict[str, Any]:
    """Settings of the run in types that JSON knows."""
    settings = {name: _plain(getattr(args, name)) for name in RECORDED if hasattr(args, name)}
    # On record where they are at work: other records, those of earlier versions among them, have no word of them.
    settings |= {name: value for name, value in measuring(args).items() if value not in (None, False, "no")}
    settings["devices"] = args.world_size
    settings["device"] = args.device.type
    settings["threads"] = torch.get_num_threads()
    settings["backbone_dtype"] = str(model.get_base_model().dtype).removeprefix("torch.")
    settings["augmentation"] = described(augmentation)
    written = {
        "classes",
        "tasks",
        "rows_in_use",
        "grown",
        "joined",
        "joined_prompts",
        "stream",
        "base_weights",
        "temperature",
        "base_model_name_or_path",
        "auto_mapping",
        "inference_mode",
    }
    late = added(config)
    settings["adapter"] = {
        name: _plain(value)
        for name, value in config.to_dict().items()
        # On record where they are at work, as above.
        if name not in written and value is not None and (name not in late or value != late[name][1])
    }
    return settings


def measuring(args: Any) -> dict[str, Any]:
    """The settings of `MEASURING`, in types that JSON knows."""
    settings = {name: _plain(getattr(args, name)) for name in MEASURING}
    return settings if settings["eval_strategy"] == "steps" else {**settings, "eval_steps": None}


def described(function: Any) -> str | None:
    """What a function is, in words that are the same in every process."""
    return None if function is None else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(function))


def versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    names = ("torch", "transformers", "peft", "accelerate", "datasets")
    return {"peft-cl": __version__, **{name: version(name) for name in names}}


def model_name(model: Any) -> str:
    """Hub name of the base model, or the last name of the folder it was loaded from; empty if made from a config."""
    name = getattr(model.get_base_model().config, "_name_or_path", "")
    return Path(name).name if Path(name).is_dir() else name


def dataset_name(scenario: Scenario) -> str:
    """The Hub id (`owner/name`) of the scenario's data, or the name of the folder of a local data set, or that under
    which it was built; of several data sets all names."""
    data = [scenario.data] if scenario.data else [(task.train, task.test) for task in scenario]
    return " + ".join(dict.fromkeys(_name_of(splits, scenario.image_column) for splits in data))


def digest_of_examples(scenario: Scenario, task: Task) -> str:
    """A short digest of a task's labels, and of some of its images as they are stored."""
    digest = hashlib.sha256()
    for split in ("train", "test"):
        digest.update(scenario.model_labels(task, split).tobytes())
        data = getattr(task, split)
        if scenario.image_column in data.column_names:  # or a transform of the data set makes it
            rows = np.unique(np.linspace(0, len(data) - 1, LOOKED_AT).astype(int))
            images = data.select_columns(scenario.image_column).select(rows).with_format("arrow")[:]
            for image in images[scenario.image_column].to_pylist():
                digest.update(_stored(image))
    return digest.hexdigest()[:12]


def _stored(image: Any) -> bytes:
    """An image as a data set holds it: its file's bytes, inside or outside of it, or numbers."""
    if not isinstance(image, dict):
        return repr(image).encode()
    content, path = image.get("bytes"), Path(image.get("path") or "")
    if content is None:
        content = path.read_bytes() if path.is_file() else path.name.encode()
    return content


def _name_of(splits: Sequence[Dataset], image_column: str) -> str:
    info = splits[0].info
    for source in info.download_checksums or ():
        if source.startswith("hf://datasets/"):
            return source.removeprefix("hf://datasets/").partition("@")[0]
    if info.dataset_name and info.dataset_name not in BUILDERS:
        return info.dataset_name
    return _folder_of(splits, image_column) or info.dataset_name or "in-memory images"


def _folder_of(splits: Sequence[Dataset], image_column: str) -> str | None:
    """Name of the folder that the files of images lie in, above those of splits and classes."""
    files = []
    for data in splits:
        stored = StoredImages.of(data, image_column)
        rows = np.unique(np.linspace(0, len(data) - 1, 100).astype(int))
        files += [] if stored is None else [stored.file(row) for row in rows]
    if not files or not all(file and os.path.isabs(file) for file in files):
        return None
    folder = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
    while folder.name in SPLIT_NAMES:
        folder = folder.parent
    return folder.name or None


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool, type(None))):
        return getattr(value, "value", value)
    if isinstance(value, (list, tuple, set)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return str(value)
