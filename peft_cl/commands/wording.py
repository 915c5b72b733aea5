"""Remedies that the library gives for Python, said for the command line."""

from __future__ import annotations

import re
from dataclasses import fields

from ..hub.terms import NOT_SETTINGS
from ..trainer import ContinualTrainingArguments
from .data_options import option_of
from .methods import METHODS
from .sections import DatasetSettings, ScenarioSettings


#: Words of a message -> how the command has it.
PHRASES = (
    (r"Load the backbone with dtype=torch\.float32, or write", "Leave --dtype out, or write"),
    (r"more passes are task_free\(\.\.\., passes=\.\.\.\)", "more passes are --scenario.passes"),
    (r"[Tt]rain anew without resume_from_checkpoint(, in another output_dir)?", "begin anew with --overwrite"),
    (r"Call train\(resume_from_checkpoint=True\) to go on with it", "--resume goes on with it"),
    (r"set bad_images, of the training arguments, to '(\w+)'", r"give --training.bad_images \1"),
    (r"\bby resuming it\b", "by --resume"),
    (r"\bby token=", "by --training.hub_token"),
    (r", or call model\.load_sums\(folder\)", ""),
    (r"; with a loop of your own, model\.save_sums\(folder\)", ""),
    (r"examples\.(\S+): was \S+, is '\w+'", r"the images of \1 are others"),
)

#: The same, for arguments of `push_adapter`.
OF_PUSH = (
    (r"\bby token=", "by --token"),
    (r"\bby sums=False", "by --no-sums"),
    (r"\brevision= or pull_request=", "--revision or --pull-request"),
    (r"\brevision=", "--revision"),
    (r"\bprivate=True", "--private"),
    (r"\bbase_model=", "--model"),
)

#: `name=`, with a value or without.
SETTING = r"(?<![\w.(-])([a-z]\w+)=(True|False|None|'\w+'|[\d.]*\d|\[[^\]]*\])?(?=[\s,.;:)]|$)"


def sections() -> dict[str, str]:
    """Name of a setting -> the section it is in; the first one that has it."""
    owners = [
        ("dataset", DatasetSettings.__dataclass_fields__),
        ("scenario", ScenarioSettings.__dataclass_fields__),
        ("training", [each.name for each in fields(ContinualTrainingArguments) if each.init]),
        *(
            ("adapter", [each.name for each in fields(method.config_class) if each.name not in NOT_SETTINGS])
            for method in METHODS.values()
        ),
    ]
    return {name: section for section, names in reversed(owners) for name in names}


def for_the_command_line(message: str, word: str = "train") -> str:
    """The message with its remedies as options of `peft-cl WORD`.

    Example:
        >>> for_the_command_line("Set train_mask=False, or name another by label_column=.")
        'Set --adapter.train_mask False, or name another by --dataset.label_column.'
    """
    for words, option in (*(OF_PUSH if word == "push" else ()), *PHRASES):
        message = re.sub(words, option, message)
    known = sections()

    def as_option(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if name not in known:
            return found[0]
        if word == "compare":  # whose runs have these settings, and not the command
            return f"{known[name]}.{name}" + (f": {value}" if value else "")
        return f"--{known[name]}.{name}" + (f" {value}" if value else "")

    message = re.sub(SETTING, as_option, message)
    if word in ("evaluate", "calibrate"):  # which have no configuration
        message = re.sub(r"(?:--)?\bdataset\.([a-z_]+)", lambda found: option_of(found[1]), message)
        message = message.replace("--scenario.domain_column", "--domain-column")
    return message
