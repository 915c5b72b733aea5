"""Adapters fetched from the Hub, whole."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from ..tuners.base.fetched import check_fetched
from .faults import hub_faults


#: What of a repository an adapter is made of; pictures and cards are for the eye.
WANTED = ("*.json", "*.safetensors")


def fetch_adapter(name: str, revision: str | None = None, token: str | None = None) -> Path:
    """Fetch an adapter's files into the Hub's cache, those that are not there yet, and return their folder.

    Args:
        name: The repository, `"user/name"`.
        revision: Branch, tag or commit; `None`: `main`.
        token: For a private repository. `None`: that of `hf auth login`, or `HF_TOKEN`.

    Raises:
        HubError: There is no such repository, or the way to it broke. No part of a file is kept.
        ValueError: A file was damaged on its way; it is removed.
    """
    with hub_faults(f"{name!r} cannot be fetched", token):
        folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=list(WANTED)))
    for path in folder.rglob("*"):
        if path.is_file():
            check_fetched(path)
    return folder
