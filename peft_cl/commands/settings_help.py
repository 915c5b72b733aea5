"""All settings of a run, as `peft-cl train --help` lists them: names, defaults and the classes' own help."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

from ..hub.terms import NOT_SETTINGS
from ..trainer import ContinualTrainingArguments
from ..tuners import CodaPromptConfig, DualPromptConfig, L2PConfig, LinearProbeConfig
from .sections import DatasetSettings, ModelSettings, ScenarioSettings


#: Whose settings the section `adapter` has, by the names of the methods.
ADAPTERS = {"l2p": L2PConfig, "dualprompt": DualPromptConfig, "coda": CodaPromptConfig, "frozen": LinearProbeConfig}
WIDTH = 79


def settings_help() -> str:
    """Return the settings section by section, each with its default and its help."""
    inherited = {each.name for each in fields(TrainingArguments)}
    own = (each for each in fields(ContinualTrainingArguments) if each.name not in inherited)
    parts = [
        "Settings, with their defaults:",
        _section("model", fields(ModelSettings)),
        _section("dataset", fields(DatasetSettings)),
        _section("scenario", fields(ScenarioSettings)),
        _adapter(),
        _section("training", own),
        "  ... and all of transformers.TrainingArguments.",
    ]
    return "\n".join(parts)


def _section(name: str, settings: Any) -> str:
    return "\n".join([f"\n{name}:", *(_entry(each) for each in settings if "help" in each.metadata)])


def _adapter() -> str:
    """A setting once for all methods that mean the same by it."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for method, config_class in ADAPTERS.items():
        for each in fields(config_class):
            if each.name not in NOT_SETTINGS and "help" in each.metadata:
                found.setdefault((each.name, each.metadata["help"]), {})[method] = _default(each)
    lines = ["\nadapter:"]
    for (name, text), defaults in found.items():
        methods = "" if len(defaults) == len(ADAPTERS) else f"; {', '.join(defaults)}"
        lines.append(_lines(name, "/".join(dict.fromkeys(defaults.values())) + methods, text))
    return "\n".join(lines)


def _entry(setting: Field) -> str:
    return _lines(setting.name, _default(setting), setting.metadata["help"])


def _default(setting: Field) -> str:
    if setting.default is not MISSING:
        value = setting.default
    elif setting.default_factory is not MISSING:
        value = setting.default_factory()
    else:
        return "needed"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def in_lines(text: str) -> str:
    """The text as lines of a terminal."""
    return "\n".join(textwrap.wrap(text, WIDTH, break_on_hyphens=False))


def _lines(name: str, default: str, text: str) -> str:
    return "\n".join([f"  {name} ({default})", *_wrapped(text)])


def _wrapped(text: str) -> Iterator[str]:
    yield from textwrap.wrap(
        text, WIDTH - 6, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
    )
