"""A suite: which runs there are, and which tables they fill, from one file."""

from __future__ import annotations

import hashlib
import math
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
#: Bytes that a row's folder may have in its name: systems refuse more than 255.
LONGEST_FOLDER = 120
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
        """Name of the folder that its runs are in: letters, digits and what no system minds; a long one is cut."""
        parts = [self.method, *(f"{name.split('.')[-1]}-{value}" for name, value in self.settings)]
        name = "_".join(re.sub(r"(?:[^\w.+-]|_)+", "-", part).strip("-.").lower() for part in parts)
        if len(name.encode()) <= LONGEST_FOLDER:
            return name
        digest = hashlib.sha256(self.title.encode()).hexdigest()[:8]
        return f"{name.encode()[: LONGEST_FOLDER - 9].decode(errors='ignore')}-{digest}"


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
        if self.methods == []:
            raise ValueError("methods is empty. Name one or more, or take it out for a table of all.")
        for name, value in self.titles.items():
            convert(f"titles.{name}", value, str)
        wrong = next((name for name in self.columns if name not in MEASURES), None)
        if wrong is not None:
            raise unknown("column", wrong, MEASURES)


@dataclass(frozen=True)
class Published:
    """Figures of a paper, which stand in tables beside the measured ones, marked as such.

    Tables with `across` leave them out: they do not say of which of its columns they are.
    """

    method: str = field(metadata={"help": "Name of the row."})
    source: str = field(metadata={"help": "Paper, protocol and weights."})
    values: dict[str, float] = field(metadata={"help": "Numbers by column, as tables show them (percent)."})

    def __post_init__(self) -> None:
        wrong = next((name for name in self.values if name not in MEASURES), None)
        if wrong is not None:
            raise unknown("column", wrong, MEASURES)
        for name, value in self.values.items():
            if not math.isfinite(convert(f"published.values.{name}", value, float)):
                raise ValueError(f"values.{name} is {value}, but must be a number. Take it out if it is not known.")


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
        for name in self.methods:
            if not isinstance(name, str) or not re.search(r"[^\W_]", name):
                raise ValueError(
                    f"methods has the name {brief(name)}, but a name must be text with a letter or a digit. Rename "
                    "it; a number or a truth value needs quotes."
                )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}, but must be different whole numbers, one or more.")
        wrong = next((seed for seed in self.seeds if not 0 <= seed < 2**32), None)
        if wrong is not None:
            raise ValueError(f"seeds has {wrong}, but a seed must be a whole number from 0 to 2**32 - 1.")
        if len(self.seeds) > 1 and not self.seeded:
            raise ValueError(
                f"seeded is empty, so that the runs of the seeds {brief(self.seeds)} would be the same. Give one "
                f"seed, or the settings that it sets, such as {SEEDED}."
            )
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
    _refuse_run(config)
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
        _check_titles(table, given)
    counts = any(name in COUNTING for table in tables for name in table.columns)
    rows = [row for name in given.methods for row in _rows(name, given, counts)]
    _refuse_one_folder(rows)
    runs = [_run(row, seed, given) for seed in given.seeds for row in rows]
    return Suite(given, rows, runs, tables, published)


def _refuse_run(config: Mapping[str, Any]) -> None:
    """A file for `peft-cl train` is no suite, and a suite without its first sections is told what they are."""
    of_run = [name for name in config if name in OF_RUNS]
    if of_run and "methods" not in config:
        raise CommandError(
            f"This is no suite: it has the sections of one run ({', '.join(of_run)}), and no methods. Give it to "
            "`peft-cl train`, or put these sections below `defaults:` and name the runs below `methods:`."
        )
    check_names("suite", config, SuiteSettings.__dataclass_fields__)
    for name, example in (("methods", "`methods: {Frozen: {method: frozen}}`"), ("output_dir", "`output_dir: out/s`")):
        if config.get(name) in (None, ""):
            raise CommandError(f"The suite has no {name}. Write such as {example}.")


def _check_titles(table: TableSettings, given: SuiteSettings) -> None:
    """Heads are of columns, of settings, of the values that stand across, and of the methods' own column."""
    own = [each.get("settings") for each in given.methods.values() if isinstance(each, dict)]
    settings = [each for each in (given.settings, *own) if isinstance(each, dict)]
    across = [values for each in settings for name, values in each.items() if name == table.across]
    values = [str(value) for each in across if isinstance(each, list) for value in each]
    known = {"method", *MEASURES, *(str(name) for each in settings for name in each), *values}
    wrong = next((name for name in table.titles if str(name) not in known), None)
    if wrong is not None:
        raise unknown("column or setting for titles", wrong, known)


def _rows(name: str, given: SuiteSettings, counts: bool) -> Iterator[Row]:
    """The rows of a method: one for each combination of settings."""
    own = check_names(f"methods.{name}", given.methods[name], [*OF_RUNS, *OF_METHODS])
    settings = own.get("settings", given.settings)
    if not isinstance(settings, dict):
        raise CommandError(f"settings of {name} is {brief(settings)}, but must be a mapping of names and lists.")
    for setting, values in settings.items():
        _check_setting(setting, values)
    category = convert(f"methods.{name}.category", own.get("category"), str | None)
    sections = {section: value for section, value in own.items() if section not in OF_METHODS}
    for combination in product(*settings.values()):
        changes = tuple(zip(settings, combination, strict=True))
        config = merged(check_names("defaults", given.defaults, OF_RUNS), sections)
        if counts:
            config = merged({"training": {"count_flops": True}}, config)
        apply_overrides(config, changes, OF_RUNS)
        yield Row(name, changes, config, category)


def _check_setting(name: Any, values: Any) -> None:
    """A setting of rows: a dotted name, and a list of different values."""
    section = name.split(".")[0] if isinstance(name, str) else name
    if section not in OF_RUNS:
        raise unknown("section for settings", section, OF_RUNS)
    if not isinstance(values, list) or not values:
        raise CommandError(f"settings.{name} is {brief(values)}, but must be a list of values. Give one.")
    again = next((value for place, value in enumerate(values) if value in values[:place]), None)
    if again is not None:
        raise CommandError(f"settings.{name} has {brief(again)} more than once. Take one out.")


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
