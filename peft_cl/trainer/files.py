"""Writing into a run's folder: at once or not at all, with errors that say what is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..disk import temporary


#: Folders in the run's for files that are written, and for whole ones that are put into their places.
ASIDE, COMPLETE = ".saving", ".saved"
#: Folders in the run's that a run writes into, or removes.
OWN_FOLDERS = (ASIDE, COMPLETE, "_state", "backbone", "runs")


def check_writable(folder: Path, adapters: Iterable[str] = ()) -> None:
    """Raise an `OSError` that names the folder and the remedy if nothing can be written into it, and a `ValueError`
    if what is written there would go elsewhere, or an adapter has the name of a folder that is the run's."""
    for name in adapters:
        if name in OWN_FOLDERS:
            raise ValueError(
                f"The adapter is named {name!r}, and would be saved in a folder of that name, which the run keeps "
                "other files in. Give it another name."
            )
        _refuse_link(folder / name)
    check_no_links(folder)
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


def check_no_links(folder: Path) -> None:
    """Refuse links and special files where a run in `folder` writes and removes: what is outside stays as it is.

    The folder itself may be a link, and single files beside the adapter, which are replaced and not written into.

    Raises:
        ValueError: it names the first one.
    """
    for name in OWN_FOLDERS:
        top = folder / name
        _refuse_link(top)
        for place, folders, files in os.walk(top):
            for each in (*folders, *files):
                _refuse_link(Path(place, each))


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        what = f"is a symbolic link to {os.readlink(path)[:200]!r}"
    elif path.exists() and not (path.is_file() or path.is_dir()):
        what = "is no regular file"
    else:
        return
    raise ValueError(
        f"{str(path)!r} {what}, but a run writes and removes files there, and must not touch any outside its folder. "
        "Remove it, or give another output_dir."
    )


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
            remove(left)
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
    """Put whole files into their places in `folder` that an interrupted process had not moved there.

    Raises:
        ValueError: a file is a link, or its place is behind one; nothing was moved then.
    """
    check_no_links(folder)
    complete = folder / COMPLETE
    found = sorted(Path(place, name) for place, _, names in os.walk(complete) for name in names)
    places = [folder / path.relative_to(complete) for path in found]
    for place in places:
        for parent in list(place.relative_to(folder).parents)[:-1]:
            _refuse_link(folder / parent)
    for path, place in zip(found, places, strict=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    remove(complete)
