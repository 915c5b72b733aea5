"""A name for the embedded backbone that holds on every machine, for peft_cl and for the loaders of transformers."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft.config import PeftConfigMixin
from transformers.utils import hub


#: Where peft_cl's own backbones lie.
FOLDER = Path(__file__).parent
#: Folder in an adapter's, and the name of its base model then, for a backbone that was trained along with it.
BESIDE = "backbone"


def embedded_folder(name: Any) -> Path | None:
    """The folder of the embedded backbone that is called `name`; None if there is none, or a folder here of that
    name."""
    name = str(name)
    if not re.fullmatch(r"[\w-]+", name) or os.path.isdir(name):
        return None
    return FOLDER / name if (FOLDER / name / "config.json").is_file() else None


def portable_name(name: str | None) -> str | None:
    """The name of an embedded backbone for its folder, wherever peft_cl is installed; others as they are.

    Example:
        >>> portable_name("/home/anna/venv/lib/python3.11/site-packages/peft_cl/assets/vit-tiny-64")
        'vit-tiny-64'
    """
    *folders, last = re.split(r"[\\/]", str(name or "").rstrip("\\/"))
    if folders[-2:] == ["peft_cl", "assets"] and (FOLDER / last / "config.json").is_file():
        return last
    return name


def resolve_embedded_names() -> None:
    """Let `from_pretrained` and `pipeline` of transformers find an embedded backbone by its name.

    An adapter's file names its base model, and these read the file themselves and look for the name on the Hub. A
    path would hold on one machine. transformers has no place to enter names, so its one function that finds files is
    wrapped: it gets the folder in place of the name, and all other names untouched.
    """
    find = hub.cached_files
    if getattr(find, "finds_embedded", False):
        return

    @functools.wraps(find)
    def cached_files(path_or_repo_id: Any, *args: Any, **kwargs: Any) -> Any:
        return find(embedded_folder(path_or_repo_id) or path_or_repo_id, *args, **kwargs)

    cached_files.finds_embedded = True
    hub.cached_files = cached_files


def _fetched_backbone(repo_id: str, options: dict[str, Any]) -> Path:
    """The folder with the backbone that lies beside an adapter on the Hub, fetched from there."""
    known = ("revision", "token", "cache_dir", "local_files_only")
    given = {name: options[name] for name in known if options.get(name) is not None}
    return Path(snapshot_download(repo_id, allow_patterns=[f"{BESIDE}/*"], **given))


def resolve_backbones_beside() -> None:
    """Let `PeftConfig.from_pretrained`, and so `AutoPeftModel`, find a backbone that lies beside its adapter, here or
    on the Hub.

    The file names it by its folder there. PEFT reads files of all methods in one place and tells none of them where
    it read, so that place is wrapped; adapters whose base model has another name are as they were.
    """
    read = PeftConfigMixin.from_pretrained.__func__
    if getattr(read, "finds_beside", False):
        return

    @functools.wraps(read)
    def from_pretrained(cls: type, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        config = read(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if config.base_model_name_or_path == BESIDE:
            folder = Path(pretrained_model_name_or_path, subfolder or "")
            if not folder.is_dir():
                folder = _fetched_backbone(str(pretrained_model_name_or_path), kwargs)
            # PEFT saves adapters of other names than "default" into folders of their own.
            found = [place / BESIDE for place in (folder, folder.parent) if (place / BESIDE).is_dir()]
            config.base_model_name_or_path = str(found[0]) if found else BESIDE
        return config

    from_pretrained.finds_beside = True
    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)
