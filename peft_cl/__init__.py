"""Prompt-pool continual learning for Hugging Face vision models: L2P, DualPrompt and CODA-Prompt as PEFT adapters."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from .version import __version__  # noqa: F401


def _is_command() -> bool:
    """Whether this process is `peft-cl` or `python -m peft_cl.cli`, whose `--help` shall not wait for torch."""
    started = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""  # "-m" until the module is found
    return started in ("peft-cl", "peft-cl.exe") or (started == "-m" and "peft_cl.cli" in sys.orig_argv)


if TYPE_CHECKING or not _is_command():
    from .api import *  # noqa: F403
    from .api import __all__  # noqa: F401
else:

    def __getattr__(name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        from . import api

        return getattr(api, name)
