"""What a run was started with, kept in its folder, so that `--resume` need not be told again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..disk import local_path, read_json, replacing
from .errors import CommandError
from .options import parse_yaml, read_config


#: What begins with "_" is left out of uploads.
FILE = "_given.json"
Override = tuple[str, Any]


def remember(folder: Path, config: dict[str, Any], overrides: Sequence[Override]) -> None:
    """Write what the run is started with into its folder; a token is left out."""
    kept = {"config": config, "overrides": [each for each in overrides if each[0] != "training.hub_token"]}
    kept["config"] = {
        name: {key: each for key, each in value.items() if key != "hub_token"} if isinstance(value, dict) else value
        for name, value in config.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE) as aside:
        aside.write_text(json.dumps(kept, indent=2, default=str), encoding="utf-8")


def recall(path: str, overrides: Sequence[Override], resume: bool) -> tuple[dict[str, Any], list[Override]]:
    """Return the configuration and the changes to it that a run goes by.

    Args:
        path: A configuration file, or the folder of a run.
        overrides: The changes that the command names.
        resume: Whether a run is to be resumed: then the changes that it was started with hold too, and those named
            now come after them.

    Raises:
        CommandError: There is no such file, or what is kept in the folder is damaged.
    """
    overrides = list(overrides)
    if Path(path).is_dir():
        kept = _read(Path(path))
        if kept is None:
            raise CommandError(f"The folder {path!r} does not say how its run was started. Give the CONFIG.yaml.")
        return kept["config"], [*kept["overrides"], *overrides]
    config = read_config(path)
    output = dict(overrides).get("output_dir", config.get("output_dir"))
    kept = _read(local_path(output)) if resume and isinstance(output, str) else None
    return config, [*(kept["overrides"] if kept else ()), *overrides]


def _read(folder: Path) -> dict[str, Any] | None:
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        kept = read_json(file)
        return {"config": dict(kept["config"]), "overrides": [(str(key), value) for key, value in kept["overrides"]]}
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise CommandError(f"{str(file)!r} is damaged ({error}). Remove it, and give all settings again.") from error


def as_words(overrides: Sequence[Override]) -> list[str]:
    """Return changes as words of a command line."""
    return [word for key, value in overrides for word in (f"--{key}", _as_yaml(value))]


def _as_yaml(value: Any) -> str:
    if isinstance(value, str):
        try:
            if parse_yaml(value, "") == value and not value.startswith("--"):
                return value
        except CommandError:
            pass
    return json.dumps(value, default=str)
