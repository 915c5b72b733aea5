"""Where a result comes from: names, settings and versions, for the record of a run."""

from __future__ import annotations

import dataclasses
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetInfo

from ..scenarios import Scenario
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
)


def hyperparameters(args: Any, model: Any, config: Any, augmentation: Any) -> dict[str, Any]:
    """Settings of the run in types that JSON knows."""
    settings = {name: _plain(getattr(args, name)) for name in RECORDED if hasattr(args, name)}
    settings["devices"] = args.world_size
    settings["device"] = args.device.type
    settings["threads"] = torch.get_num_threads()
    settings["backbone_dtype"] = str(model.get_base_model().dtype).removeprefix("torch.")
    settings["augmentation"] = described(augmentation)
    written = {
        "classes",
        "tasks",
        "rows_in_use",
        "stream",
        "base_model_name_or_path",
        "auto_mapping",
        "inference_mode",
    }
    settings["adapter"] = {
        name: _plain(value) for name, value in config.to_dict().items() if name not in written and value is not None
    }
    return settings


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
    """The Hub id (`owner/name`) of the scenario's data, or the name under which a local data set was built; of several
    data sets all names."""
    return " + ".join(dict.fromkeys(_name_of(task.train.info) for task in scenario))


def _name_of(info: DatasetInfo) -> str:
    for source in info.download_checksums or ():
        if source.startswith("hf://datasets/"):
            return source.removeprefix("hf://datasets/").partition("@")[0]
    return info.dataset_name or "in-memory images"


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
