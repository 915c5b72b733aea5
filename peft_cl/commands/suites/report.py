"""What a suite leaves: its tables for people and machines, pictures, and one page that stands alone."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...disk import replacing
from ...metrics import RunResults
from ...metrics.results import to_json
from ...trainer.extras import spared
from .page import page
from .suite import Run, Suite
from .tables import Found, Table, all_tables, lines_of_runs


MARKDOWN, CSV, JSON, PAGE, PICTURES = "report.md", "runs.csv", "report.json", "report.html", "pictures"
#: Lines that a picture of curves may have: more could not be told apart.
MOST_LINES = 12


@dataclass(frozen=True)
class Picture:
    """A picture of the report."""

    title: str
    file: Path

    def embedded(self) -> str:
        """As an address that holds the picture itself."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.file.read_bytes()).decode('ascii')}"


def write_report(suite: Suite, failed: Sequence[Run]) -> tuple[list[Table], list[Path]]:
    """Write the report into the suite's folder; returns its tables and files."""
    found = Found(suite)
    tables, folder = all_tables(suite, found), suite.folder
    folder.mkdir(parents=True, exist_ok=True)
    heads, lines = lines_of_runs(suite, found)
    missing = [f"{run.title} failed; its log is {run.file('.log')}" for run in failed]
    head = "\n\n".join(filter(None, [f"# {suite.given.title}" if suite.given.title else "", suite.given.text]))
    written = {
        MARKDOWN: "\n\n".join(filter(None, [head, *(table.markdown() for table in tables), *missing])) + "\n",
        CSV: _as_csv(heads, lines),
        JSON: _as_json(suite, tables, heads, lines),
    }
    pictures: list[Picture] = []
    with spared(f"The report in {folder} has no pictures"):
        pictures = draw(suite, found, folder / PICTURES)
    written[PAGE] = page(suite, tables, pictures, missing)
    for name, text in written.items():
        with replacing(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")
    return tables, [*(folder / name for name in written), *(each.file for each in pictures)]


def _as_csv(heads: Sequence[str], lines: Sequence[Sequence]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(["" if value is None else value for value in line] for line in lines)
    return text.getvalue()


def _as_json(suite: Suite, tables: Sequence[Table], heads: Sequence[str], lines: Sequence[Sequence]) -> str:
    found = {
        "title": suite.given.title,
        "seeds": suite.given.seeds,
        "runs": [dict(zip(heads, line, strict=True)) for line in lines],
        "tables": [
            {
                "title": table.title,
                "columns": table.heads,
                "rows": [[{"text": cell.text, "number": cell.number} for cell in row] for row in table.rows],
                "note": table.note,
            }
            for table in tables
        ],
    }
    return json.dumps(to_json(found), indent=1) + "\n"


def draw(suite: Suite, found: Found, folder: Path) -> list[Picture]:
    """Curves of all rows, and their matrices, of each sequence of tasks that the suite has."""
    from ...plots.comparison import plot_comparison
    from ...plots.curves import plot_curves

    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, runs in _sequences(suite, found).items():
        for start in range(0, len(runs), MOST_LINES):
            part = [each for line in runs[start : start + MOST_LINES] for each in line]
            number = len(pictures) // 2 + 1
            for kind, plot in (("curves", plot_curves), ("matrices", plot_comparison)):
                file = folder / f"{kind}_{number}.svg"
                plot(part, path=file)
                more = f", part {start // MOST_LINES + 1}" if len(runs) > MOST_LINES else ""
                what = "Accuracy and forgetting" if kind == "curves" else "Accuracy of each task after each task"
                pictures.append(Picture(f"{what}: {name}{more}", file))
    return pictures


def _sequences(suite: Suite, found: Found) -> dict[str, list[list[RunResults]]]:
    """The rows' records, under the rows' names; pictures are of one kind and number of tasks each."""
    sequences: dict[str, list[list[RunResults]]] = {}
    for row in suite.rows:
        runs = [replace(each, method=row.title) for each in found.of(row)]
        if runs:
            name = f"{runs[0].scenario.get('name', '')}, {len(runs[0].task_names)} tasks"
            sequences.setdefault(name, []).append(runs)
    return sequences
