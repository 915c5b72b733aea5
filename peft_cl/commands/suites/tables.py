"""The tables of a suite, from the records of its runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

from ...metrics import RunResults
from ...metrics.measures import MEASURES, NOTHING, Beside, Measure, points, whole_percent
from ...metrics.significance import holm, paired_difference
from ...text import counted, in_markdown, percent
from .running import finished
from .suite import Published, Row, Suite, TableSettings


#: Below it a difference is told as more than noise.
LEVEL = 0.05
#: Ways to show a fraction as percent.
PERCENT = (points, whole_percent)


@dataclass(frozen=True)
class Cell:
    """What stands in a table.

    Attributes:
        text: what is shown.
        number: by which a page sorts; None: by the text.
        named: whether the text is a user's, so that Markdown must not read it.
    """

    text: str
    number: float | None = None
    named: bool = False

    def markdown(self) -> str:
        return in_markdown(self.text, 300) if self.named else self.text


@dataclass
class Table:
    """A table of texts.

    Attributes:
        title: its heading.
        heads: of the columns.
        rows: cells, as many as there are heads.
        labels: how many of the first columns say what a row is.
        note: lines below it.
        published: which rows are a paper's.
    """

    title: str
    heads: list[str]
    rows: list[list[Cell]]
    labels: int = 1
    note: list[str] = field(default_factory=list)
    published: set[int] = field(default_factory=set)

    def markdown(self) -> str:
        """As GitHub shows it."""
        aligned = ["---"] * self.labels + ["---:"] * (len(self.heads) - self.labels)
        known = {measure.title for measure in MEASURES.values()}
        heads = [head if head in known else in_markdown(head) for head in self.heads]
        lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(aligned)}|"]
        lines += [f"| {' | '.join(cell.markdown() for cell in row)} |" for row in self.rows]
        title = [f"### {in_markdown(self.title)}", ""] if self.title else []
        notes = [line for each in self.note for line in ("", in_markdown(each, 600))]
        return "\n".join([*title, *lines, *notes])


class Found:
    """The records of a suite's finished runs, by row and seed."""

    def __init__(self, suite: Suite):
        self.suite = suite
        self.records = {
            (run.row.folder, run.seed): results for run in suite.runs if (results := finished(run)) is not None
        }

    def of(self, row: Row | None, seeds: Sequence[int] | None = None) -> list[RunResults]:
        """The row's records, in the order of the seeds."""
        if row is None:
            return []
        wanted = self.suite.given.seeds if seeds is None else seeds
        return [found for seed in wanted if (found := self.records.get((row.folder, seed))) is not None]

    def seeds(self, row: Row) -> list[int]:
        return [seed for seed in self.suite.given.seeds if (row.folder, seed) in self.records]

    def beside(self, row: Row, seed: int) -> Beside:
        """What the row's run of a seed is measured against."""
        given = self.suite.given
        methods = (given.reference, given.relative_to or next(iter(given.methods)))
        others = [self.of(self.suite.row_of(method, row), [seed]) if method else [] for method in methods]
        reference, relative_to = (next(iter(each), None) for each in others)
        return Beside(reference, relative_to, row.category)

    def values(self, measure: Measure, row: Row) -> list[Any]:
        """Of each finished run of the row."""
        seeds = self.seeds(row)
        return measure.values(self.of(row), [self.beside(row, seed) for seed in seeds])

    def cell(self, measure: Measure, row: Row | None) -> Cell:
        values = self.values(measure, row) if row is not None else []
        numbers = [value[-1] if isinstance(value, tuple) else value for value in values]
        are_numbers = numbers and all(isinstance(value, (int, float)) for value in numbers)
        text = measure.cell(values) if values else NOTHING
        is_name = measure is MEASURES["category"] and text != NOTHING
        return Cell(text, fmean(numbers) if are_numbers else None, named=is_name)


def make_table(suite: Suite, found: Found, settings: TableSettings) -> Table:
    """One table of the suite."""
    rows = [row for row in suite.rows if settings.methods is None or row.method in settings.methods]
    published = [
        each
        for each in suite.published
        if (settings.methods is None or each.method in settings.methods)
        and set(each.values) & set(settings.columns)
        and settings.across is None
    ]
    return _Maker(suite, found, settings, rows, published).table()


class _Maker:
    """Puts a table together."""

    def __init__(
        self, suite: Suite, found: Found, settings: TableSettings, rows: list[Row], published: list[Published]
    ):
        self.suite, self.found, self.settings, self.published = suite, found, settings, published
        self.all_rows = rows
        self.groups: dict[tuple, list[Row]] = {}
        for row in rows:
            key = (row.method, *((name, str(value)) for name, value in row.settings if name != settings.across))
            self.groups.setdefault(key, []).append(row)

    @cached_property
    def names(self) -> list[str]:
        """The settings by which the table's rows differ: each has a column."""
        found: dict[str, set[str]] = {}
        for row in self.all_rows:
            for name, value in row.settings:
                found.setdefault(name, set()).add(str(value))
        return [name for name, values in found.items() if len(values) > 1 and name != self.settings.across]

    @cached_property
    def across(self) -> list[Any]:
        """The values that are columns; one, None, where no setting is."""
        if self.settings.across is None:
            return [None]
        return list(dict.fromkeys(dict(row.settings).get(self.settings.across) for row in self.all_rows))

    @property
    def says_method(self) -> bool:
        return not self.names or len({row.method for row in self.all_rows}) > 1 or bool(self.published)

    def table(self) -> Table:
        labels = (["method"] if self.says_method else []) + self.names
        heads = [self._head(name) for name in labels]
        for value in self.across:
            for column in self.settings.columns:
                heads.append(self._head(column) if value is None else self._of_value(column, value))
        rows = [self._row(group) for group in self.groups.values()]
        table = Table(self.settings.title, heads, rows, len(labels), [])
        for each in self.published:
            table.published.add(len(table.rows))
            table.rows.append(self._of_paper(each, len(labels)))
        table.note = list(self._notes())
        return table

    def _head(self, name: str) -> str:
        if name in self.settings.titles:
            return self.settings.titles[name]
        if name in MEASURES:
            return MEASURES[name].title
        return name.split(".")[-1].replace("_", " ").capitalize()

    def _of_value(self, column: str, value: Any) -> str:
        own = self.settings.titles.get(str(value), str(value))
        return own if len(self.settings.columns) == 1 else f"{own}: {self._head(column)}"

    def _row(self, group: list[Row]) -> list[Cell]:
        first = group[0]
        settings = dict(first.settings)
        labels = [Cell(first.method, named=True)] if self.says_method else []
        for name in self.names:
            value = settings.get(name)
            number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
            labels.append(Cell(NOTHING) if value is None else Cell(str(value), number, named=True))
        cells = []
        for value in self.across:
            row = next(
                (row for row in group if value is None or dict(row.settings).get(self.settings.across) == value), None
            )
            cells += [self.found.cell(MEASURES[column], row) for column in self.settings.columns]
        return [*labels, *cells]

    def _of_paper(self, each: Published, labels: int) -> list[Cell]:
        cells = [Cell(f"{each.method} (published: {each.source})", named=True), *[Cell(NOTHING)] * (labels - 1)]
        for _ in self.across:
            for column in self.settings.columns:
                value, scale = each.values.get(column), 100 if MEASURES[column].shown in PERCENT else 1
                cells.append(Cell(NOTHING) if value is None else Cell(f"{value:.12g}", value / scale))
        return cells

    def _notes(self) -> Iterator[str]:
        if self.settings.note:
            yield self.settings.note
        seeds = self.suite.given.seeds
        if len(seeds) > 1:
            yield f"Mean ± sample standard deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))})."
        missing = [
            f"{row.title} has {len(self.found.seeds(row))} of {counted(len(seeds), 'run')}"
            for row in self.all_rows
            if len(self.found.seeds(row)) < len(seeds)
        ]
        if missing:
            yield f"Not complete: {'; '.join(missing)}."


def tested(suite: Suite, found: Found) -> Table | None:
    """Which methods differ from one of them by more than noise; None for a single row or seed."""
    given = suite.given
    against = given.tested_against or next(iter(given.methods))
    others = [row for row in suite.rows if row.method != against and suite.row_of(against, row) is not None]
    results = []
    for row in others:
        other = suite.row_of(against, row)
        seeds = [seed for seed in found.seeds(row) if seed in found.seeds(other)]
        pairs = [
            [each.metrics.get("average_accuracy", math.nan) for each in found.of(one, seeds)] for one in (row, other)
        ]
        if len(seeds) > 1:
            results.append((row, paired_difference(*pairs)))
    if not results:
        return None
    corrected = holm([each.p for _, each in results])
    rows = []
    for (row, each), p in zip(results, corrected, strict=True):
        spread = f"{percent(each.mean, 2)} ± {percent(each.deviation, 2)}"
        rows.append(
            [
                Cell(row.title, named=True),
                Cell(spread if each.mean < 0 else f"+{spread}", each.mean),
                Cell(str(each.seeds), each.seeds),
                Cell(_p(each.p), each.p),
                Cell(_p(p), p),
                Cell("yes" if p < LEVEL else "no"),
            ]
        )
    return Table(
        f"Against {against}",
        ["Method", "Difference in final average accuracy (points)", "Seeds", "p", "p, corrected", "More than noise"],
        rows,
        note=[
            "Paired t test over the seeds, two-sided, corrected for the number of rows (Holm). With few seeds only "
            "large differences can be told from noise."
        ],
    )


def _p(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.3f}" if value >= 0.001 else "< 0.001"


def all_tables(suite: Suite, found: Found) -> list[Table]:
    """The suite's tables, and the tests."""
    tables = [make_table(suite, found, each) for each in suite.tables]
    of_tests = tested(suite, found)
    return tables + ([of_tests] if of_tests else [])


def lines_of_runs(suite: Suite, found: Found) -> tuple[list[str], list[list[Any]]]:
    """Every measure of every finished run, for machines: names of the columns, and a line for each run."""
    names = list(dict.fromkeys(name for row in suite.rows for name, _ in row.settings))
    measures = [name for name in MEASURES if name != "category"]
    heads = ["method", *names, "seed", "category", "folder", *measures]
    lines = []
    for run in suite.runs:
        results = found.records.get((run.row.folder, run.seed))
        if results is None:
            continue
        beside = found.beside(run.row, run.seed)
        values = [MEASURES[name].values([results], [beside])[0] for name in measures]
        values = [list(value) if isinstance(value, tuple) else value for value in values]
        settings = dict(run.row.settings)
        own = [settings.get(name) for name in names]
        lines.append([run.row.method, *own, run.seed, run.row.category, str(run.folder), *values])
    return heads, lines
