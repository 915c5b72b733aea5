"""Tensors that depend on data and settings alone, kept in files for later runs."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..disk import temporary
from ..version import __version__


NAME = "kept"


class TensorFiles:
    """A folder of tensors, each with a row for every example of a data set.

    A file is named by a digest of all that its content depends on, so what has changed is computed anew and nothing is
    ever stale. A file is written aside and renamed, so processes may share the folder, and its own digest is checked
    when it is read.

    Args:
        folder: where the files are.
        what: what is kept, a word that a person knows it by.
        image_column: column of the images.
    """

    def __init__(self, folder: str | Path, what: str, image_column: str):
        self.folder = Path(folder)
        self.what = what
        self.image_column = image_column

    def of(
        self,
        data: Dataset,
        settings: dict[str, Any],
        compute: Callable[[], torch.Tensor],
        everywhere: Callable[[bool], bool] = bool,
    ) -> torch.Tensor:
        """The tensor (examples, ...) for `data` under `settings` (types that JSON knows), mapped into memory.

        It is computed where there is no whole file of it, and not kept where nothing says what `data` holds.

        Args:
            everywhere: whether something is true on every process, where `compute` needs all of them.
        """
        path = self._path(data, settings)
        tensor = path and self._read(path, len(data))
        if everywhere(tensor is not None):
            return tensor
        tensor = compute()
        if path is None:
            return tensor
        self._write(path, tensor)
        kept = self._read(path, len(data))
        return tensor if kept is None else kept

    def _path(self, data: Dataset, settings: dict[str, Any]) -> Path | None:
        """Where the tensor of `data` belongs; None where nothing says what it holds."""
        fingerprint, outside = getattr(data, "_fingerprint", None), images_outside(data, self.image_column)
        if not fingerprint or outside is None:
            return None
        content = {"what": self.what, "column": self.image_column, "data": fingerprint, "files": outside}
        key = json.dumps({**content, "versions": versions(), **settings}, sort_keys=True, default=str)
        return self.folder / f"{self.what}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

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
        aside = temporary(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.touch()
            mode = aside.stat().st_mode  # what the umask says; the library's own file is for its owner alone
            save_file({NAME: tensor.contiguous()}, aside, metadata={"sha256": _digest(tensor)})
            aside.chmod(mode)
            os.replace(aside, path)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{self.what} cannot be kept in {path.parent} ({error}); the run goes on.", stacklevel=2)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def images_outside(data: Dataset, column: str) -> str | None:
    """A digest of the files that `data` names in place of holding their images; None where one cannot be asked.

    The fingerprint of a data set that was made of paths knows the paths alone.
    """
    digest = hashlib.sha256()
    for rows in data.select_columns([column]).with_format("arrow").iter(1000):
        images = rows[column]
        if not pyarrow.types.is_struct(images.type):
            return None
        inside, names = (pyarrow.compute.struct_field(images, field) for field in ("bytes", "path"))
        for name in names.filter(pyarrow.compute.is_null(inside)).to_pylist():
            try:
                status = os.stat(name)
            except (OSError, TypeError):
                return None
            digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    """Of all whose code has a part in what is kept."""
    found: dict[str, str | None] = {"peft_cl": __version__}
    for package in ("torch", "transformers", "pillow", "torchvision"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy()).hexdigest()
