"""An adapter as a session, from its folder or its name on the Hub."""

from __future__ import annotations

import torch

from ..commands.adapters import SavedAdapter
from ..commands.errors import CommandError
from ..commands.evaluate import load_adapter, processor_of
from ..commands.networks import network_of
from ..disk import local_path
from ..text import plain
from .session import Session


def load_session(
    adapter: str,
    *,
    model: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    read_only: bool = False,
) -> Session:
    """Load an adapter with its base model and its image processor, checked as the commands do it.

    Args:
        adapter: Its folder, or its name on the Hub.
        model: The base model; `None`: the one that the adapter names.
        dtype: Number format of the backbone, `"float32"`, `"bfloat16"` or `"float16"`; `None`: as in training.
        trust_remote_code: Run code that comes with the base model.
        read_only: Load it to predict alone: it cannot be taught.

    Raises:
        CommandError: There is no such adapter or base model, a file is damaged, it has learnt no classes, or it holds
            a network for each task.

    Example:
        >>> load_session("out").classify(Image.open("cat.jpg")).prediction.names[0]    # doctest: +SKIP
        'cat'
    """
    saved = SavedAdapter.read(adapter)
    if not saved.config.tasks:
        raise CommandError("The adapter has learnt no classes yet, so it takes images for nothing. Train it first.")
    if network_of(saved.folder):
        raise CommandError(
            f"The adapter {saved.name!r} holds a network for each task, and must be told the task of an image. Use "
            "peft-cl predict with --task."
        )
    loaded = load_adapter(saved, model, dtype or saved.dtype, trust_remote_code, is_trainable=not read_only)
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = processor_of(saved, loaded, trust_remote_code)
    # No path of this machine is shown to others.
    name = local_path(adapter).resolve().name if local_path(adapter).exists() else adapter
    return Session(loaded, processor, name=plain(name), task_names=saved.names_of_tasks)
