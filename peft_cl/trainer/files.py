"""Writing into a run's folder: at once or not at all, with errors that say what is kept."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


#: Folders in the run's for files that are written, and for whole ones that are put into their places.
ASIDE, COMPLETE = ".saving", ".saved"


def check_writable(folder: Path) -> None:
    """Raise an `OSError` that names the folder and the remedy if nothing can be written into it."""
    probe = temporary(folder / "writable")
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
    """A folder to write into, whose files then replace those in `folder`.

    Files can be renamed one by one only, and weights that grew need the configuration written with them: killed in
    between, a process leaves two that do not fit. So the files wait in a folder that is renamed when all are whole,
    and `finish_writing` moves those that an interruption left there.

    Args:
        folder: where the files go.
        writes: whether this process is the one that writes.
    """
    aside = folder / ASIDE
    if writes:
        for left in (aside, folder / COMPLETE):  # all of it is written anew
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
    try:
        yield aside
        if writes:
            os.replace(aside, folder / COMPLETE)
            finish_writing(folder)
    finally:
        if writes:
            shutil.rmtree(aside, ignore_errors=True)


def finish_writing(folder: Path) -> None:
    """Put whole files into their places in `folder` that an interrupted process had not moved there."""
    complete = folder / COMPLETE
    for path in sorted(complete.rglob("*")):
        place = folder / path.relative_to(complete)
        if path.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    shutil.rmtree(complete, ignore_errors=True)


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process has, on this machine or another."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
