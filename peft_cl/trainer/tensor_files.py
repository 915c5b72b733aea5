"""Tensors that depend on data and settings alone, kept in files for later runs."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


NAME = "kept"


class TensorFiles:
    """A folder of tensors, each with a row for every example of a data set.

    A file is named by a digest of all that its content depends on, so what has changed is computed anew and nothing is
    ever stale. A file is written aside and renamed, so processes may share the folder, and its own digest is checked
    when it is read.

    Args:
        folder: where the files are.
        what: what is kept, a word that a person knows it by.
    """

    def __init__(self, folder: str | Path, what: str):
        self.folder = Path(folder)
        self.what = what

    def of(self, data: Dataset, settings: dict[str, Any], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor (examples, ...) for `data` under `settings` (types that JSON knows), mapped into memory.

        It is computed where there is no whole file of it.
        """
        fingerprint = getattr(data, "_fingerprint", None)
        if not fingerprint:
            return compute()
        key = json.dumps({"what": self.what, "data": fingerprint, **settings}, sort_keys=True, default=str)
        path = self.folder / f"{self.what}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        tensor = self._read(path, len(data))
        if tensor is None:
            tensor = compute()
            self._write(path, tensor)
        return tensor

    def _read(self, path: Path, examples: int) -> torch.Tensor | None:
        """The tensor in a file; None if there is none, or none of so many examples that is whole.

        Warns:
            UserWarning: The file is damaged, and is made anew.
        """
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                digest, tensor = (file.metadata() or {}).get("sha256"), file.get_tensor(NAME)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"The {self.what} in {path} cannot be read ({error}) and are made anew.", stacklevel=2)
            return None
        if digest != _digest(tensor) or len(tensor) != examples:
            warnings.warn(f"The {self.what} in {path} are damaged and are made anew.", stacklevel=2)
            return None
        return tensor

    def _write(self, path: Path, tensor: torch.Tensor) -> None:
        """Write a file at once or not at all.

        Warns:
            UserWarning: It cannot be written; the run goes on without it.
        """
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({NAME: tensor.contiguous()}, aside, metadata={"sha256": _digest(tensor)})
            os.replace(aside, path)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{self.what} cannot be kept in {path.parent} ({error}); the run goes on.", stacklevel=2)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy()).hexdigest()
