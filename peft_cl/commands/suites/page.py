"""The page of a suite: one HTML file that needs nothing beside it. Its tables sort by a click on a column's head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

from ...text import plain
from .suite import Suite
from .tables import Cell, Table


if TYPE_CHECKING:
    from .report import Picture


def page(suite: Suite, tables: Sequence[Table], pictures: Sequence[Picture], missing: Sequence[str]) -> str:
    """The whole file."""
    title = _shown(suite.given.title or "Comparison")
    parts = [f"<h1>{title}</h1>"]
    parts += [f"<p>{_shown(suite.given.text)}</p>"] if suite.given.text else []
    parts += [f'<p class="failed">{_shown(each)}</p>' for each in missing]
    parts += [_table(each) for each in tables]
    parts += [
        f'<figure><img src="{each.embedded()}" alt="{_shown(each.title)}">'
        f"<figcaption>{_shown(each.title)}</figcaption></figure>"
        for each in pictures
    ]
    body = "\n".join(parts)
    parts_of_file = {"style": _asset("page.css"), "script": _asset("page.js")}
    return Template(_asset("page.html")).substitute(title=title, body=body, **parts_of_file)


def _asset(name: str) -> str:
    return resources.files("peft_cl.assets").joinpath(name).read_text(encoding="utf-8").strip()


def _table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col"{_kind(place, table)}><button type="button">{_shown(head)}</button></th>'
        for place, head in enumerate(table.heads)
    )
    rows = "\n".join(_row(number, table) for number in range(len(table.rows)))
    title = f"<h2>{_shown(table.title)}</h2>\n" if table.title else ""
    notes = "".join(f'<p class="note">{_shown(line)}</p>' for line in table.note)
    return (
        f'{title}<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>\n'
        f"{notes}"
    )


def _row(number: int, table: Table) -> str:
    cells = "".join(
        f"<td{_kind(place, table)}{_number(cell)}>{_shown(cell.text)}</td>"
        for place, cell in enumerate(table.rows[number])
    )
    return f"<tr{' class=published' if number in table.published else ''}>{cells}</tr>"


def _number(cell: Cell) -> str:
    """By which the page sorts."""
    return "" if cell.number is None or not math.isfinite(cell.number) else f' data-number="{cell.number!r}"'


def _kind(place: int, table: Table) -> str:
    return ' class="label"' if place < table.labels else ""


def _shown(text: str) -> str:
    return escape(plain(text, 2000))
