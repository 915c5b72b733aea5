"""Where a backbone or a data set comes from: the Hub, a local folder, or this package."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..disk import local_path
from ..text import code


#: Where peft_cl's own backbones lie.
EMBEDDED = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class Source:
    """Where a backbone or data set comes from, as far as its name tells."""

    name: str  # what a reader calls it, "" if it has no name
    is_local: bool  # a folder, not a repository on the Hub
    is_embedded: bool = False  # the folder of a backbone that peft_cl brings along

    @property
    def short_name(self) -> str:
        """The name without the owner's."""
        return self.name.split("/")[-1]

    @property
    def hub_id(self) -> str | None:
        """The name if it may stand in the card's metadata, which must be a valid id."""
        try:
            validate_repo_id(self.name)
        except HFValidationError:
            return None
        return self.name or None

    def link(self, kind: str, path: str = "") -> str:
        """Name it in a sentence of Markdown: a link if it is on the Hub, else what it is.

        Args:
            kind: What it is, "backbone" or "data set".
            path: What precedes an id of that kind in the Hub's addresses.
        """
        if not self.name:
            return f"a {kind} without a name"
        if self.is_embedded:
            return f"{code(self.name)}, the {kind} that peft_cl brings along"
        if self.is_local:
            return f"a local {kind}, {code(self.name)} (a folder, not a repository on the Hub)"
        return f"[`{self.name}`](https://huggingface.co/{path}{self.name})" if self.hub_id else code(self.name)


#: How a path on the user's machine begins: from the root or a drive, the home, or a folder given by dots.
BEGINS = r"""(?:(?:~|\.{1,2})?/|[A-Za-z]:[\\/])"""
#: Such a path in a text, and one that is all of a word and may have blanks in it.
PATH_INSIDE = re.compile(rf"""(?<![\w.:/~-]){BEGINS}[^\s'"{{}}\[\],]*""")
PATH_ALONE = re.compile(rf"""{BEGINS}[^'"{{}}\[\],]*""")


def without_folders(command: str) -> str:
    """Return a command line with each local path's last name alone: where it lies is nobody else's business."""
    try:
        words = shlex.split(command)
    except ValueError:  # no command line
        return PATH_INSIDE.sub(_last_name, command)
    return shlex.join(map(without_path, words))


def without_path(text: str) -> str:
    """Return a text with the last name alone of the local path that it is, or of those that are in it."""
    return (PATH_ALONE if PATH_ALONE.fullmatch(text) else PATH_INSIDE).sub(_last_name, text)


def _last_name(path: re.Match[str]) -> str:
    return re.split(r"[\\/]", path[0].rstrip("/\\"))[-1] or path[0]


def find_source(name: str) -> Source:
    """Tell a local path from a Hub id: what is there as a folder, or cannot be an id, is a path."""
    name = (name or "").strip()
    if not name:
        return Source("", is_local=False)
    try:
        return _find(name)
    except (OSError, ValueError):  # no name that a file can have
        return Source(re.split(r"[\\/]", name)[-1], is_local=True)


def _find(name: str) -> Source:
    if (EMBEDDED / name).is_dir() and "/" not in name:
        return Source(name, is_local=True, is_embedded=True)
    path = local_path(name)
    is_local = path.exists() or path.is_absolute() or name.startswith(".") or name.count("/") != 1 or "\\" in name
    if not is_local:
        return Source(name, is_local=False)
    *folders, last = re.split(r"[\\/]", str(path.resolve()))
    return Source(last, is_local=True, is_embedded=folders[-2:] == ["peft_cl", "assets"])
