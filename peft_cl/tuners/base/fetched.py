"""Files that the Hub's client fetched: whether they are what the Hub has."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path


def check_fetched(path: Path) -> None:
    """Refuse a file of the Hub's cache that was damaged on its way or since, and remove it: the next load fetches it.

    The cache keeps a file under the digest that the Hub names (SHA-256 of large files, git's of small ones), but the
    client compares sizes alone. Files elsewhere, and caches without such names (Windows), pass.

    Raises:
        ValueError: the content has another digest; the message names the file.
    """
    stored = path.resolve()
    if stored.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", stored.name):
        return
    is_large = len(stored.name) == 64
    digest = hashlib.sha256() if is_large else hashlib.sha1(b"blob %d\0" % stored.stat().st_size)
    with stored.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    if digest.hexdigest() == stored.name:
        return
    for each in (path, stored):
        each.unlink(missing_ok=True)
    raise ValueError(
        f"The file {path.name!r} was damaged on its way from the Hub, or since: its digest is not the one that the "
        "Hub names. The copy is removed; load it again, and it is fetched anew."
    )
