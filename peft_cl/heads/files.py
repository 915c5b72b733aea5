"""The file in which the sums of a head lie beside its adapter: wanted to learn on and to join, not to predict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..disk import replacing


SUMS_FILE = "head_sums.safetensors"
#: In the file's metadata: what the sums belong to.
FACTS = "facts"


def save_sums(folder: str | Path, state: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> Path:
    """Write what `Head.going_on` gave into `folder`, at once or not at all.

    Args:
        facts: what the sums belong to, in types that JSON knows; `load_sums` compares it.
    """
    path = Path(folder) / SUMS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        tensors = {name: value.contiguous() for name, value in state.items()}
        # Under one name: the library writes several in an order that changes, and equal sums shall be equal files.
        save_file(tensors, aside, metadata={FACTS: json.dumps(facts)})
    return path


def load_sums(path: str | Path, facts: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors in the file at `path`.

    Args:
        facts: what they must belong to.

    Raises:
        ValueError: the file is damaged, or its sums belong to something else; the message says what differs.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = dict(json.loads((file.metadata() or {}).get(FACTS, "{}")))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise ValueError(
            f"The sums of the head in {str(path)!r} cannot be read ({error}). Copy the file again, or save the "
            "adapter anew."
        ) from error
    differ = [
        f"{name} is {_short(found.get(name))}, not {_short(value)}"
        for name, value in facts.items()
        if found.get(name) != value
    ]
    if differ:
        raise ValueError(
            f"The sums of the head in {str(path)!r} are not this adapter's: {'; '.join(differ)}. Take the file that "
            "was saved with the adapter, on the same backbone (loaded in float32 or bfloat16)."
        )
    spoilt = [name for name, value in tensors.items() if not value.isfinite().all()]
    if spoilt:
        raise ValueError(
            f"The sums of the head in {str(path)!r} hold numbers that are not finite ({', '.join(spoilt[:5])}). Copy "
            "the file again, or observe the images anew."
        )
    return tensors


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
