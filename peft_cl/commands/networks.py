"""Adapters that hold a network for each task, as PackNet and HAT leave them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft import PeftModel

from ..strategies import hat, packnet


#: File beside an adapter -> what makes a loaded model the network of one task.
NETWORKS: dict[str, Callable[[PeftModel, Path, int], None]] = {
    packnet.MASKS_FILE: packnet.apply_task,
    hat.GATES_FILE: hat.apply_task,
}


def network_of(folder: Path) -> Callable[[PeftModel, Path, int], None] | None:
    """What makes a model that is loaded from `folder` the network of one of its tasks; None if it is one for all."""
    return next((apply_task for file, apply_task in NETWORKS.items() if (folder / file).is_file()), None)
