"""What a search says while it runs and at its end, and the tables it writes."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..disk import replacing
from ..text import in_markdown, percent
from .search import FAILED, FINISHED, PRUNED, Row


CSV_FILE, JSON_FILE = "trials.csv", "trials.json"
#: Trials in the table at the end.
SHOWN = 5


class Progress:
    """A line for each trial that is over; on a terminal a bar under them, with what is measured meanwhile.

    Args:
        metric: Name of the metric that trials are judged by.
        trials: Number of trials in all.
        over: How many are over already.
        steps: Number of tasks of a trial, over all seeds.
        lower_is_better: Whether a lower value is a better one.
        best: The best one so far.
    """

    def __init__(
        self, metric: str, trials: int, over: int, steps: int, lower_is_better: bool = False, best: Row | None = None
    ):
        self.metric, self.trials, self.steps = metric, trials, steps
        self.lower_is_better, self.best = lower_is_better, best
        bars = sys.stderr.isatty()
        self.bar = tqdm(total=trials, initial=over, desc="trials", unit="trial", dynamic_ncols=True) if bars else None

    def task(self, number: int, step: int, value: float) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"trial {number}, task {step + 1} of {self.steps}: {percent(value)}%")

    def trial(self, row: Row) -> None:
        if row.state == FINISHED and (self.best is None or self._is_better(row.value)):
            self.best = row
        line = line_of(row, self.metric, self.trials, self.best)
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.write(line)
            self.bar.update(1)

    def _is_better(self, value: float) -> bool:
        return value < self.best.value if self.lower_is_better else value > self.best.value

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def line_of(row: Row, metric: str, trials: int, best: Row | None = None) -> str:
    """What came of a trial, and of what settings.

    Example:
        >>> line_of(Row(3, "finished", 0.5, {"training.learning_rate": 0.01}, {}, 12.3, ""), "forgetting", 20)
        'trial 3 of 20: forgetting 50.00%, 12 s (training.learning_rate 0.01)'
    """
    what = f"{_words(metric)} {percent(row.value, 2)}%" if row.value == row.value else ""
    said = {
        FINISHED: what,
        PRUNED: f"given up between tasks at {what}",
        FAILED: f"failed: {row.reason}",
    }[row.state]
    mark = ", the best so far" if best is not None and row.number == best.number else ""
    settings = ", ".join(f"{name} {_shown(value)}" for name, value in row.settings.items())
    return f"trial {row.number} of {trials}: {said}, {row.seconds:.0f} s{mark} ({settings})"


def best_table(ranking: Sequence[Row], metric: str) -> str:
    """The best trials as a GitHub table."""
    names = list(ranking[0].settings)
    header = ["Trial", f"{_words(metric).capitalize()} (%)", *names]
    rows = [
        [str(row.number), percent(row.value, 2), *(in_markdown(_shown(row.settings[name])) for name in names)]
        for row in ranking[:SHOWN]
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---:|" * len(header), *lines[1:]])


def counted_states(rows: Sequence[Row]) -> str:
    """How many trials came to what end.

    Example:
        >>> counted_states([Row(1, "failed", float("nan"), {}, {}, 1.0, "no memory")])
        '1 failed'
    """
    counts = {state: sum(row.state == state for row in rows) for state in (FINISHED, PRUNED, FAILED)}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def write_tables(folder: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Write every trial into `trials.csv`, a line for each, and `trials.json`, which also says what the search was.

    A value that is not there is empty in the one and null in the other.
    """
    trials = [_as_json(row) for row in rows]
    with replacing(folder / JSON_FILE) as aside:
        aside.write_text(
            json.dumps({"search": dict(facts), "trials": trials}, indent=2, default=str), encoding="utf-8"
        )
    settings = list(dict.fromkeys(name for row in rows for name in row.settings))
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    with replacing(folder / CSV_FILE) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", "value", *settings, *metrics, "seconds", "reason"])
        for each in trials:
            values = [_cell(each["settings"].get(name)) for name in settings]
            measured = [each["metrics"].get(name) for name in metrics]
            writer.writerow(
                [each["number"], each["state"], each["value"], *values, *measured, each["seconds"], each["reason"]]
            )


def _as_json(row: Row) -> dict[str, Any]:
    facts = asdict(row)
    facts["value"] = None if row.value != row.value else row.value
    facts["metrics"] = {name: None if value != value else value for name, value in row.metrics.items()}
    return facts


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict, bool)) or value is None else value


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
