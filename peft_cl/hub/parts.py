"""Parts that all cards have in common: tables, tags, settings, classes, the citation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..text import code, in_markdown, plain
from .papers import Paper
from .terms import NOT_SETTINGS


def tags(*names: str | None) -> list[str]:
    """Tags of an adapter: ours, and names in the form of tags ("CODA-Prompt" becomes "coda-prompt")."""
    own = (re.sub(r"[^a-z0-9]+", "-", plain(name).lower()).strip("-") for name in names if name)
    return list(dict.fromkeys(["peft", "peft-cl", "continual-learning", *filter(None, own)]))


def table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(header: tuple[str, str], rows: Mapping[str, Any]) -> str:
    return "\n".join(
        [table_row(header), "|---|---|", *(table_row([name, str(value)]) for name, value in rows.items())]
    )


def settings_of_method(config: Mapping[str, Any]) -> list[str]:
    """Heading and table of an adapter's settings; nothing where it has none."""
    settings = {name: value for name, value in config.items() if name not in NOT_SETTINGS and value is not None}
    if not settings:
        return []
    shown = {code(name): code(json.dumps(value, default=str), 500) for name, value in settings.items()}
    return ["### Settings of the method", table(("Setting", "Value"), shown)]


def classes_in_order(classes: Sequence[str] | None) -> list[str]:
    if not classes:
        return []
    names = ", ".join(in_markdown(name) for name in classes)
    return [f"<details><summary>Classes, in their order</summary>\n\n{names}\n\n</details>"]


def citation(paper: Paper | None) -> str:
    return f"## Citation\n\n```bibtex\n{paper.bibtex}\n```" if paper else ""
