"""Saving an adapter that was taught, as a folder that is whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..assets.resolving import BESIDE
from ..disk import local_path, temporary
from ..strategies.fine_tuning import put_beside


def check_output(folder: str | Path) -> Path:
    """The folder, if something can be saved there and nothing is lost by it.

    Raises:
        FileExistsError: It holds files already, or is no folder.
        PermissionError: It cannot be written.
    """
    path = local_path(folder)
    if path.is_symlink() or (path.exists() and not path.is_dir()) or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(
            f"{str(path)!r} is there already, and nothing is written over. Give the name of a new or empty folder."
        )
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise PermissionError(f"No folder can be made in {str(place)!r}. Give one in a place that you may write to.")
    return path


def save_adapter(model: Any, processor: Any, folder: Path, *, card: str | None = None, replace: bool = False) -> Path:
    """Write a model's active adapter with the sums of its head, its image processor, and a backbone that lies beside
    it, as fine-tuning leaves one.

    Args:
        folder: See `check_output`.
        card: Its `README.md`; `None`: there is none.
        replace: Whether it may be there; it is replaced as a whole.
    """
    path = local_path(folder) if replace else check_output(folder)
    tuner, adapter = model.base_model, model.active_adapter
    config = model.peft_config[adapter]
    base = config.base_model_name_or_path
    backbone = Path(base or "")
    with replacing_folder(path) as aside:
        own = aside if adapter == "default" else aside / adapter  # as PEFT has it
        own.mkdir(exist_ok=True)
        try:
            if backbone.name == BESIDE and backbone.is_dir():
                shutil.copytree(backbone, own / BESIDE)
                for file in sorted((own / BESIDE).iterdir()):
                    put_beside(file, own)
                config.base_model_name_or_path = BESIDE  # in the file no machine's path
            model.save_pretrained(aside, selected_adapters=[adapter])
        finally:
            config.base_model_name_or_path = base
        (own / "README.md").unlink(missing_ok=True)  # PEFT's empty card
        if card is not None:
            (own / "README.md").write_text(card, encoding="utf-8")
        tuner.save_sums(own)
        processor.save_pretrained(own)
    return path


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `path` when the block ends; after an error `path` is as it was.

    A process that is killed between the two renames leaves both folders whole, under other names beside `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, before = temporary(path), temporary(path)
    try:
        aside.mkdir()
        yield aside
        if path.exists():
            os.rename(path, before)
        os.rename(aside, path)
    finally:
        for folder in (aside, before):
            shutil.rmtree(folder, ignore_errors=True)
