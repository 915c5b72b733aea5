"""What of a run is nobody else's business is taken out before it is shared: places on this machine, above all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..assets.resolving import BESIDE, portable_name
from ..metrics import RunResults
from .sources import find_source, without_folders, without_path


#: What precedes the name of a backbone that is a folder: no repository on the Hub can be called so.
ELSEWHERE = "path/to"


def cleaned_record(results: RunResults, base_model: str | None = None) -> RunResults:
    """The record without paths of this machine: of each the last name stays, and all numbers stay.

    Args:
        results: The record of a run.
        base_model: The backbone's name on the Hub; `None`: what is on record.

    Example:
        >>> cleaned_record(RunResults.load("out")).command    # doctest: +SKIP
        'peft-cl train coda.yaml --dataset birds'
    """
    return dataclasses.replace(
        results,
        base_model=base_model or without_path(results.base_model),
        dataset=without_path(results.dataset),
        hyperparameters=_without_paths(results.hyperparameters),
        command=without_folders(results.command) if results.command else None,
    )


def cleaned_config(config: Mapping[str, Any], base_model: str | None = None) -> dict[str, Any]:
    """An adapter's configuration whose base model has a name that means something elsewhere.

    A folder of this machine becomes `path/to/` with its last name, which `from_pretrained` looks for in vain instead
    of taking another model of that name.
    """
    facts = {name: value if name == "classes" else _without_paths(value) for name, value in config.items()}
    return {**facts, "base_model_name_or_path": base_model or shared_base(config.get("base_model_name_or_path"))}


def shared_base(name: str | None) -> str | None:
    """The name that an adapter which is shared gives its base model."""
    name = portable_name(name)
    if not name or name == BESIDE or name.startswith(f"{ELSEWHERE}/"):
        return name
    source = find_source(name)
    return f"{ELSEWHERE}/{source.name}" if source.is_local and not source.is_embedded else name


def _without_paths(value: Any) -> Any:
    if isinstance(value, str):
        return without_path(value)
    if isinstance(value, Mapping):
        return {name: _without_paths(each) for name, each in value.items()}
    return [_without_paths(each) for each in value] if isinstance(value, (list, tuple)) else value
