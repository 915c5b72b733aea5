"""The formats of adapters: what each added, and what an earlier version would take it for."""

from __future__ import annotations

from typing import Any


#: Settings that versions before a format would leave out without a word, with the value that they take them for. What
#: is needed by no setting is written in format 1, which all read.
SINCE_FORMAT: dict[int, dict[str, Any]] = {
    2: {
        "head": "linear",
        "head_options": {},
        "head_features": None,
        "head_layers": 1,
        "train_prompts": "every_task",
        "drift_compensation": None,
        "interpolate_pos_encoding": False,
    },
    3: {},
}
#: The newest format that this version reads.
FORMAT_VERSION = max(SINCE_FORMAT)
ADDED = {name: value for settings in SINCE_FORMAT.values() for name, value in settings.items()}


def format_needed(config: Any) -> int:
    """The oldest format that says all that the settings of `config` do."""
    needed = [
        version
        for version, settings in SINCE_FORMAT.items()
        if any(getattr(config, name, value) != value for name, value in settings.items())
    ]
    return max(needed, default=1)
