"""An adapter's files against its configuration: sizes before anything of these sizes is made; then values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ...disk import check_file
from ...text import brief
from .fetched import check_fetched


#: Formats of numbers in a file, by their names there. Others (float8, 4 bits) are none that adapters are saved in.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: What a weight file that lacks a tensor may be short of: such a file is refused later, with the names.
SLACK_BYTES = 64 * 2**20


class Stored(NamedTuple):
    """A tensor in a file: its shape, and its dtype or the file's name of one that adapters do not have."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


def check_saved_files(folder: Path) -> None:
    """Refuse a damaged or special file in an adapter's folder by its name; a folder that is not here passes.

    PEFT reads the files with messages that name none of them.
    """
    check_file(folder / CONFIG_NAME)
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        check_file(folder / name, most=2**60)
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        read_header(folder / SAFETENSORS_WEIGHTS_NAME)


def read_header(path: Path) -> dict[str, Stored]:
    """Shapes and dtypes of the tensors in an adapter's safetensors file, without their values.

    Raises:
        ValueError: the file is damaged or cut short.
    """
    try:
        with safe_open(path, framework="pt") as weights:
            parts = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            return {
                name: Stored(tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))
                for name, part in parts.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The adapter file {path} is damaged or cut short ({path.stat().st_size} bytes; {error}). Copy or "
            "download it again, or save the adapter anew."
        ) from error


def part_of_pool(key: str) -> str | None:
    """The name that the tensor `key` of an adapter's file has in its pool; None: it is of another part."""
    place, _, part = key.rpartition(".")
    return part if place.endswith("_pool") else None


def file_beside(source: tuple[str, Mapping[str, Any]] | None, name: str) -> Path | None:
    """A file of the adapter that was loaded from `source`, here or from the Hub; None if it has none.

    Args:
        source: `PromptPoolConfig.source`: the folder or Hub name, and the words that it was loaded with.
        name: the file.
    """
    if source is None:
        return None
    place, words = source
    subfolder = words.get("subfolder") or ""
    if Path(place).is_dir():
        path = Path(place, subfolder, name)
        return path if path.is_file() else None
    known = ("revision", "cache_dir", "token", "force_download", "local_files_only")
    given = {word: value for word, value in words.items() if word in known and value is not None}
    try:
        path = Path(hf_hub_download(place, name, subfolder=subfolder or None, **given))
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None
    check_fetched(path)
    return path


def check_sizes(method: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, Stored]) -> None:
    """Refuse a configuration that asks for tensors of other sizes than those in the file, before they are made.

    Args:
        method: the method's name, for the message.
        expected: name in the file -> a tensor of the right shape, which need not hold values.
        found: the file's header.
    """
    _check_shapes(method, {name: value for name, value in expected.items() if name in found}, found)
    missing = {name: value.numel() * 4 for name, value in expected.items() if name not in found}
    if sum(missing.values()) > SLACK_BYTES:
        raise ValueError(_incomplete(method, missing, ()))


def check_tensors(method: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that are not, one for one, those of the adapter: names, shapes, kinds of number, values.

    Raises:
        ValueError: it names the tensors, and what is wrong with them.
    """
    missing, surplus = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or surplus:
        raise ValueError(_incomplete(method, missing, surplus))
    _check_shapes(method, expected, {name: Stored(tuple(value.shape), value.dtype) for name, value in found.items()})
    spoilt = sorted(name for name, value in found.items() if not value.isfinite().all())
    if spoilt:
        raise ValueError(
            f"The {method} adapter has numbers that are not finite (NaN or infinite) in {brief(spoilt)}: its training "
            "went wrong, or the file is damaged. Every prediction would be a guess: train it anew with a lower "
            "learning rate, or restore the file."
        )


def _check_shapes(method: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, Stored]) -> None:
    misfits = [
        f"{name}: file {found[name].shape}, model {tuple(value.shape)}"
        for name, value in expected.items()
        if found[name].shape != tuple(value.shape)
    ]
    if misfits:
        raise ValueError(
            f"The {method} adapter does not fit this model: {_some(misfits)}. A different last size "
            "means a base model of another width: load the adapter's own base model. Different rows or classes "
            "mean another number of tasks: load it with PeftModel.from_pretrained, which builds the adapter as it "
            "was saved, or under a new adapter name."
        )
    strange = [
        f"{name}: file {str(found[name].dtype).removeprefix('torch.')}, model "
        f"{str(value.dtype).removeprefix('torch.')}"
        for name, value in expected.items()
        if _kind(found[name].dtype) != _kind(value.dtype)
    ]
    if strange:
        raise ValueError(
            f"The {method} adapter has numbers of another kind than it is saved in: {_some(strange)}. Casting them "
            "would lose what they say. Restore the file, or save the adapter anew."
        )


def _incomplete(method: str, missing: Iterable[str], surplus: Iterable[str]) -> str:
    return (
        f"The {method} adapter file lacks {brief(sorted(missing))} and has {brief(sorted(surplus))} that the adapter "
        "does not know: it is incomplete, or of another method or other settings. Save the adapter again with "
        "save_pretrained, and keep its config and its weights together."
    )


def _kind(dtype: torch.dtype | str) -> str:
    if isinstance(dtype, str) or dtype not in DTYPES.values():
        return str(dtype)
    return "floating" if dtype.is_floating_point else "truth" if dtype == torch.bool else "whole"


def _some(parts: list[str]) -> str:
    return "; ".join(parts[:10]) + (f"; and {len(parts) - 10} more" if len(parts) > 10 else "")
