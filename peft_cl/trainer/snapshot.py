"""The state of a task sequence on disk: what an interrupted run goes on from."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import random
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..disk import read_json, replacing
from ..text import brief
from .files import remove


#: Folder in the run's for snapshots and checkpoints. The Trainer's uploads leave out what begins with "_".
STATE_FOLDER = "_state"
FILE, PREVIOUS = "sequence.pt", "sequence.previous.pt"
#: List of a checkpoint's files with their digests, written last.
SEAL = "files.json"


def save_snapshot(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors, numbers, text, lists and dicts of them); the snapshot before it is kept as well.

    At every moment there is a whole snapshot in the folder, wherever the process is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    path = folder / FILE
    with replacing(path) as aside:
        with open(aside, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            (folder / PREVIOUS).unlink(missing_ok=True)
            try:
                os.link(path, folder / PREVIOUS)
            except OSError:  # a file system without hard links
                shutil.copy2(path, folder / PREVIOUS)


def load_snapshot(folder: Path) -> dict[str, Any] | None:
    """The last whole snapshot in `folder`, None if there is no file of one.

    Raises:
        ValueError: There are files, but none is whole.

    Warns:
        UserWarning: The last one is damaged and the one before is used.
    """
    damaged = []
    for path in (folder / FILE, folder / PREVIOUS):
        if not path.is_file():
            continue
        content = _whole_content(path)
        if content is not None:
            if damaged:
                warnings.warn(f"{damaged[0]} is damaged; {path.name}, one task before it, is used.", stacklevel=2)
            return _unpacked(content, path)
        damaged.append(path)
    if damaged:
        raise ValueError(
            f"{' and '.join(map(str, damaged))} {'is' if len(damaged) == 1 else 'are'} damaged, so there is nothing "
            "to go on from. Train anew without resume_from_checkpoint."
        )
    return None


def snapshot_before(folder: Path) -> dict[str, Any] | None:
    """The snapshot before the last one, None if there is none or it is damaged."""
    path = folder / PREVIOUS
    content = _whole_content(path) if path.is_file() else None
    return None if content is None else _unpacked(content, path)


def _whole_content(path: Path) -> bytes | None:
    """What was written into a file of a snapshot, None if it is damaged."""
    content = path.read_bytes()
    digest, content = content[:32], content[32:]
    return content if hashlib.sha256(content).digest() == digest else None


def _unpacked(content: bytes, path: Path) -> dict[str, Any]:
    """The state in a whole file. A right digest says that it is as it was written, not that a run wrote it."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            # As torch writes them; packed, some bytes could become any number.
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise ValueError("its parts are compressed")
        # Loading into modules and optimizers puts everything where they are.
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except Exception as error:  # whatever torch and pickle make of bytes of others
        raise ValueError(
            f"{path} is no snapshot of a run ({brief(str(error))}). Train anew without resume_from_checkpoint, in "
            "another output_dir."
        ) from error
    return state


#: What a snapshot of a sequence holds at least, and the kinds of it.
KINDS: dict[str, Any] = {
    "settings": dict,
    "accuracy_matrix": list,
    "finished_tasks": int,
    "train_seconds": (int, float),
    "weights": dict,
    "strategy": dict,
    "random": dict,
}
#: What those of earlier versions may lack, and what is not there for every method.
MORE_KINDS: dict[str, Any] = {
    "prompt_usage": (list, type(None)),
    "details": dict,
    "baseline": (list, type(None)),
    "learnt": list,
    "query_seconds": (int, float),
    "most_trainable": int,
    "flops": (int, type(None)),
    "steps": int,
    "without_prompts": dict,
    "grown": (list, type(None)),
    "scaler": dict,
    "head": dict,
}


@contextmanager
def told_of_junk(folder: Path, state: Mapping[str, Any]) -> Iterator[None]:
    """Check what the snapshot `state` holds, and say of what does not fit inside the block that no run wrote it.

    Args:
        folder: Where it was found.
        state: What `load_snapshot` gave.

    Raises:
        ValueError: A part is missing, or of another kind.
    """
    try:
        for name, kind in {**KINDS, **{name: MORE_KINDS[name] for name in state if name in MORE_KINDS}}.items():
            if not isinstance(state[name], kind) or isinstance(state[name], bool):
                raise TypeError(f"{name} is {brief(state[name])}")
        matrix, finished = state["accuracy_matrix"], state["finished_tasks"]
        if not 0 <= finished <= len(matrix) or not _is_table(matrix, len(matrix)):
            raise TypeError(f"{finished} tasks are finished, and the accuracies are {brief(matrix)}")
        usage = state.get("prompt_usage")
        if usage is not None and (len(usage) < finished or not _is_table(usage, len(usage[0]) if usage else 0)):
            raise TypeError(f"{finished} tasks are finished, and the rows they chose are {brief(usage)}")
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"The state in {str(folder)!r} is not one that a run wrote ({type(error).__name__}: {brief(str(error))}). "
            "Train anew without resume_from_checkpoint, in another output_dir."
        ) from error


def _is_table(rows: list[Any], width: int) -> bool:
    """Whether all are lists of `width` numbers."""
    return all(
        isinstance(row, list) and len(row) == width and all(isinstance(value, (int, float)) for value in row)
        for row in rows
    )


def forget_folder(folder: Path) -> None:
    """Remove a folder with all that is in it, if it is there; of a link the link alone."""
    remove(folder)


def forget_state(folder: Path) -> None:
    """Remove snapshots and checkpoints of the run in `folder`."""
    forget_folder(folder / STATE_FOLDER)


def seal_checkpoint(checkpoint: Path) -> None:
    """Note what the files of a checkpoint are, which makes it whole."""
    files = {path.name: _digest(path) for path in sorted(checkpoint.iterdir()) if path.is_file()}
    with replacing(checkpoint / SEAL) as aside:
        aside.write_text(json.dumps(files, indent=2))


def whole_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint in `folder` whose files are all as they were written, None if there is none.

    Warns:
        UserWarning: A later one is damaged or was not written to its end.
    """
    checkpoints = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        wrong = _damage(checkpoint)
        if wrong is None:
            return checkpoint
        warnings.warn(f"{checkpoint} {wrong}, so the one before it is used, if there is one.", stacklevel=2)
        forget_folder(checkpoint)  # or rotation would keep it and remove whole ones
    return None


def _damage(checkpoint: Path) -> str | None:
    try:
        files = read_json(checkpoint / SEAL)
        # Files of its own, and not what a path leads to.
        if not files:
            return "was not written to its end"
        damaged = [name for name in files if Path(name).name != name or _digest(checkpoint / name) != files[name]]
    except (OSError, ValueError, TypeError):
        return "was not written to its end"
    return f"is damaged ({', '.join(damaged)})" if damaged else None


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def random_state() -> dict[str, Any]:
    """The state of all random generators that training draws from."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # of this process's device
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])


def on_cpu(state: Any) -> Any:
    """A copy of a state, its tensors in the CPU's memory."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {name: on_cpu(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(on_cpu(value) for value in state)
    return copy.deepcopy(state)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested mappings, as `name: was this, is that`."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: was {_short(old)}, is {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
