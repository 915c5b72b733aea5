"""The options of a command that has no configuration: one for each setting of the section `dataset`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any

from .errors import explained
from .sections import DatasetSettings


#: Options that are not called as their setting, with hyphens.
NAMED = {"path": "--dataset", "name": "--dataset-name", "test_split": "--split"}
#: What argparse must be told of a setting that is no text.
KINDS: dict[str, dict[str, Any]] = {
    "data_files": {"nargs": "+", "metavar": "FILE", "help": "Files that are measured on, as patterns. Default: all."},
    "test_fraction": {"type": float, "metavar": "F"},
    "split_seed": {"type": int, "metavar": "N"},
}
#: Of training alone.
LEFT_OUT = ("validation_split",)


def option_of(setting: str) -> str:
    return NAMED.get(setting, "--" + setting.replace("_", "-"))


def add_data_options(parser: argparse.ArgumentParser, required: Sequence[str] = ()) -> None:
    """Add them; settings in `required` must be given, whatever their defaults are."""
    for name, setting in DatasetSettings.__dataclass_fields__.items():
        if name not in LEFT_OUT:
            text = setting.metadata["help"].replace("%", "%%").replace("null: ", "Default: ")
            is_required = setting.default is MISSING or name in required
            if not is_required and setting.default is not None:
                text += f" Default: {setting.default}."
            options = {"metavar": "NAME", "help": text, "dest": f"dataset_{name}", **KINDS.get(name, {})}
            if is_required:
                options["required"] = True
            else:
                options["default"] = setting.default
            parser.add_argument(option_of(name), **options)


def data_settings(arguments: argparse.Namespace) -> DatasetSettings:
    """The section `dataset` that the options say.

    Raises:
        CommandError: a value does not do.
    """
    values = {name: getattr(arguments, f"dataset_{name}", None) for name in DatasetSettings.__dataclass_fields__}
    if values["data_files"] is not None:  # they are what is measured
        split = "test_split" if values["test_fraction"] is None else "train_split"
        values["data_files"] = {values[split]: values["data_files"]}
    with explained("The options of the data are wrong"):
        return DatasetSettings(**values)
