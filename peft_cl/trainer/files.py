"""Writing into a run's folder: at once or not at all, with errors that say what is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def check_writable(folder: Path) -> None:
    """Raise an `OSError` that names the folder and the remedy if nothing can be written into it."""
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"output_dir {str(folder)!r} cannot be written to ({error}), so nothing that is learnt could be kept. "
            "Give another folder, or the right to write into this one."
        ) from error


@contextmanager
def explained_writes(folder: Path, finished_tasks: int) -> Iterator[None]:
    """Turn a failed write (a full disk, for instance) into an `OSError` that says what is kept and how to go on."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch and safetensors report a full disk as errors of their own kind.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        kept = f"The first {finished_tasks} tasks are kept" if finished_tasks else "No task was finished before"
        raise OSError(
            f"Writing into {str(folder)!r} failed: {error}. {kept}: make room on the disk, make model and trainer "
            "anew with the same settings, and call train(resume_from_checkpoint=True)."
        ) from error


@contextmanager
def written_aside(folder: Path, writes: bool) -> Iterator[Path]:
    """A folder to write into, whose files then replace those in `folder` one by one.

    Args:
        folder: where the files go.
        writes: whether this process is the one that writes.
    """
    aside = folder / ".saving"
    if writes:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    try:
        yield aside
        if writes:
            for path in sorted(aside.rglob("*")):
                place = folder / path.relative_to(aside)
                if path.is_file():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, place)
    finally:
        if writes:
            shutil.rmtree(aside, ignore_errors=True)
