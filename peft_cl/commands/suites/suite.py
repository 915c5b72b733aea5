"""A suite: which runs there are, and which tables they fill, from one file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ...metrics.measures import COUNTING, MEASURES
from ...text import brief
from ..errors import CommandError, unknown
from ..options import apply_overrides, check_names, convert, fill
from ..settings import SECTIONS


#: Sections of a run that a suite says by itself.
OWN = ("output_dir", "continue_from", "earlier_test")
#: Sections of `peft-cl train` that a suite may give its runs.
OF_RUNS = tuple(name for name in SECTIONS if name not in OWN)
#: What else a method of a suite may have.
OF_METHODS = ("category", "settings")
#: Settings that each seed of a suite sets, unless it says otherwise.
SEEDED = ["training.seed", "scenario.seed"]


@dataclass(frozen=True)
class Row:
    """A method with settings, of which there is a run for each seed.

    Attributes:
        method: its name in the suite.
        settings: the dotted names and values by which it differs from other rows of the method.
        config: the sections of its runs, without a seed.
        category: kind of method, for tables.
    """

    method: str
    settings: tuple[tuple[str, Any], ...]
    config: dict[str, Any]
    category: str | None = None

    @property
    def title(self) -> str:
        """Name in messages."""
        return self.method + "".join(f", {name} {value}" for name, value in self.settings)

    @property
    def folder(self) -> str:
        """Name of the folder that its runs are in: letters, digits and what no system minds."""
        parts = [self.method, *(f"{name.split('.')[-1]}-{value}" for name, value in self.settings)]
        return "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-.").lower() for part in parts)


@dataclass(frozen=True)
class Run:
    """One run of `peft-cl train`."""

    row: Row
    seed: int
    config: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Of adapter and results."""
        return Path(self.config["output_dir"])

    def file(self, ending: str) -> Path:
        """Beside the folder: its configuration (`.yaml`), what it printed (`.log`), who has it in work (`.lock`)."""
        return self.folder.with_name(self.folder.name + ending)

    @property
    def title(self) -> str:
        return f"{self.row.title}, seed {self.seed}"


@dataclass(frozen=True)
class TableSettings:
    """A table of the suite."""

    columns: list[str] = field(metadata={"help": f"What to show of each row: {', '.join(MEASURES)}."})
    title: str = field(default="", metadata={"help": "Heading."})
    note: str = field(default="", metadata={"help": "A line below the table."})
    methods: list[str] | None = field(default=None, metadata={"help": "Rows, by method. null: all."})
    across: str | None = field(
        default=None, metadata={"help": "Dotted name of a setting whose values become columns, not rows."}
    )
    titles: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Other heads for columns and settings, by their names."}
    )

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError(f"columns is empty. Give one or more of {', '.join(MEASURES)}.")
        wrong = next((name for name in self.columns if name not in MEASURES), None)
        if wrong is not None:
            raise unknown("column", wrong, MEASURES)


@dataclass(frozen=True)
class Published:
    """Figures of a paper, which stand in tables beside the measured ones, marked as such."""

    method: str = field(metadata={"help": "Name of the row."})
    source: str = field(metadata={"help": "Paper, protocol and weights."})
    values: dict[str, float] = field(metadata={"help": "Numbers by column, as tables show them (percent)."})

    def __post_init__(self) -> None:
        wrong = next((name for name in self.values if name not in MEASURES), None)
        if wrong is not None:
            raise unknown("column", wrong, MEASURES)
        for name, value in self.values.items():
            convert(f"published.values.{name}", value, float)


@dataclass(frozen=True)
class SuiteSettings:
    """The file of a suite."""

    methods: dict[str, Any] = field(metadata={"help": "Rows: a name, and the sections by which its runs differ."})
    output_dir: str = field(metadata={"help": "Folder for runs and tables."})
    defaults: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Sections of `peft-cl train` that all runs have."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "A run of each row for each of them."})
    seeded: list[str] = field(default_factory=lambda: list(SEEDED), metadata={"help": "Settings that the seed sets."})
    settings: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Dotted names of settings and lists of values: every combination is a row."},
    )
    tables: list[Any] = field(default_factory=list, metadata={"help": "The tables. None: one of accuracies."})
    title: str = field(default="", metadata={"help": "Heading of the page."})
    text: str = field(default="", metadata={"help": "What stands below it."})
    reference: str | None = field(
        default=None, metadata={"help": "Method that kept all data, for the intransigence of the others."}
    )
    relative_to: str | None = field(
        default=None, metadata={"help": "Method whose time and operations are 100 %. null: the first."}
    )
    tested_against: str | None = field(
        default=None, metadata={"help": "Method that each other is tested against, over the seeds. null: the first."}
    )
    published: list[Any] = field(default_factory=list, metadata={"help": "Rows of papers."})

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods is empty. Give one or more, such as `Frozen: {method: frozen}`.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}, but must be different whole numbers, one or more.")
        for name in ("reference", "relative_to", "tested_against"):
            if getattr(self, name) is not None and getattr(self, name) not in self.methods:
                raise unknown(f"method for {name}", getattr(self, name), self.methods)


@dataclass(frozen=True)
class Suite:
    """What `read` makes of the file."""

    given: SuiteSettings
    rows: list[Row]
    runs: list[Run]
    tables: list[TableSettings]
    published: list[Published]

    @property
    def folder(self) -> Path:
        return Path(self.given.output_dir)

    def row_of(self, method: str | None, like: Row) -> Row | None:
        """The row of a method that a row is measured against: with the settings in common, if there is such."""
        own = [row for row in self.rows if row.method == method]
        shared = [row for row in own if _agree(row, like)]
        return next(iter(shared), None)


def _agree(one: Row, other: Row) -> bool:
    """Whether two rows have no setting that differs."""
    settings, others = dict(one.settings), dict(other.settings)
    return all(others.get(name, value) == value for name, value in settings.items())


def read_suite(config: Mapping[str, Any]) -> Suite:
    """Turn the sections of a suite's file into its runs and tables.

    Raises:
        CommandError: an unknown name, a value of another kind, a row without a method, or two rows with one folder.
    """
    given = fill("suite", SuiteSettings, dict(config))
    tables = [fill(f"tables[{place}]", TableSettings, each) for place, each in enumerate(given.tables)]
    published = [fill(f"published[{place}]", Published, each) for place, each in enumerate(given.published)]
    tables = tables or [TableSettings(["average-accuracy", "forgetting", "memory", "training-time"])]
    known = [*given.methods, *(each.method for each in published)]
    for table in tables:
        for name in table.methods or ():
            if name not in known:
                raise unknown("method in tables", name, known)
        across = table.across
        if across is not None and across not in given.settings:
            raise unknown("setting for across", across, given.settings)
    counts = any(name in COUNTING for table in tables for name in table.columns)
    rows = [row for name in given.methods for row in _rows(name, given, counts)]
    _refuse_one_folder(rows)
    runs = [_run(row, seed, given) for seed in given.seeds for row in rows]
    return Suite(given, rows, runs, tables, published)


def _rows(name: str, given: SuiteSettings, counts: bool) -> Iterator[Row]:
    """The rows of a method: one for each combination of settings."""
    own = check_names(f"methods.{name}", given.methods[name], [*OF_RUNS, *OF_METHODS])
    settings = own.get("settings", given.settings)
    if not isinstance(settings, dict):
        raise CommandError(f"settings of {name} is {brief(settings)}, but must be a mapping of names and lists.")
    for setting, values in settings.items():
        if not isinstance(values, list) or not values:
            raise CommandError(f"settings.{setting} is {brief(values)}, but must be a list of values. Give one.")
    category = own.get("category")
    sections = {section: value for section, value in own.items() if section not in OF_METHODS}
    for combination in product(*settings.values()):
        changes = tuple(zip(settings, combination, strict=True))
        config = merged(check_names("defaults", given.defaults, OF_RUNS), sections)
        if counts:
            config = merged({"training": {"count_flops": True}}, config)
        apply_overrides(config, changes, OF_RUNS)
        yield Row(name, changes, config, None if category is None else str(category))


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of both; in mappings the second's values stand in the place of the first's."""
    result = deepcopy(dict(first))
    for name, value in second.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if both else deepcopy(value)
    return result


def _run(row: Row, seed: int, given: SuiteSettings) -> Run:
    config = deepcopy(row.config)
    apply_overrides(config, [(name, seed) for name in given.seeded], OF_RUNS)
    folder = Path(given.output_dir) / "runs" / row.folder / f"seed{seed}"
    return Run(row, seed, {**config, "output_dir": str(folder)})


def _refuse_one_folder(rows: Sequence[Row]) -> None:
    found: dict[str, Row] = {}
    for row in rows:
        if row.folder in found:
            raise CommandError(
                f"{found[row.folder].title!r} and {row.title!r} would both be in the folder {row.folder!r}, whose "
                "letters and digits they have in common. Give them names that differ in these."
            )
        found[row.folder] = row
