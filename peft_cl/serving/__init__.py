"""An adapter in use: a session that answers, learns classes from a few images and takes them back, and a page for it.

Importing this needs no gradio; `make_page` does (`pip install "peft-cl[serve]"`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .choices import Choice
from .loading import load_session
from .session import Answer, Session, Taught


if TYPE_CHECKING:
    from .page import make_page

__all__ = ["Answer", "Choice", "Session", "Taught", "load_session", "make_page"]


def __getattr__(name: str) -> Any:
    if name != "make_page":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .page import make_page

    return make_page
