"""Running a suite: what is left to do, one run after the other or several at once, and how far it is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import yaml

from ...disk import replacing
from ...metrics import RunResults
from ...metrics.results import FILE_NAME
from ...text import counted, duration, plain
from ..errors import CommandError
from ..output import say
from .launchers import InWork, Job
from .suite import Run, Suite


#: Seconds between two looks at what goes on.
INTERVAL = 0.5
#: Lines of a failed run's log that are told.
TOLD = 3


class State(Enum):
    WAITING = "waiting"
    ELSEWHERE = "in work elsewhere"
    GOING = "going"
    DONE = "done"
    FAILED = "failed"


@dataclass
class Progress:
    """How far a run is."""

    run: Run
    state: State = State.WAITING
    job: Job | None = None
    began: float = 0.0
    seconds: float = 0.0
    shown: str = field(default="", compare=False)

    def tasks(self) -> str:
        """`3 of 10 tasks`, as its record says it."""
        results = record_of(self.run)
        if results is None:
            return "no task finished yet"
        return f"{results.finished_tasks} of {counted(len(results.task_names), 'task')}"


def record_of(run: Run) -> RunResults | None:
    """The record of a run; None if it has none yet."""
    path = run.folder / FILE_NAME
    return RunResults.load(path) if path.is_file() else None


def finished(run: Run) -> RunResults | None:
    """The record of a run that is through."""
    results = record_of(run)
    return results if results is not None and results.finished_tasks == len(results.task_names) else None


def check_same(run: Run) -> None:
    """Refuse a folder in which a run of other settings lies.

    Raises:
        CommandError: it names the settings that differ.
    """
    path = run.file(".yaml")
    if not path.is_file() or not run.folder.is_dir():
        return
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    if before != json.loads(json.dumps(run.config)):
        differ = sorted(name for name in {*before, *run.config} if before.get(name) != run.config.get(name))
        raise CommandError(
            f"{str(run.folder)!r} holds a run of {run.title!r} with other settings ({', '.join(differ)}). Put them "
            "back, give another output_dir, or --overwrite to begin the suite anew."
        )


def write_config(run: Run) -> None:
    """The run as a file of its own, for `peft-cl train`."""
    path = run.file(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_text(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def run_all(suite: Suite, launcher: Any, quiet: bool = False) -> list[Run]:
    """Do the runs that are not through; returns those that failed.

    An interruption ends the runs under way, which go on from their last finished task when the suite is run again.
    """
    left = [Progress(run, State.DONE if finished(run) else State.WAITING) for run in suite.runs]
    board = Board(left, quiet)
    try:
        while True:
            _look(left, launcher, board)
            _start(left, launcher, board)
            if not any(each.state in (State.GOING, State.WAITING, State.ELSEWHERE) for each in left):
                return [each.run for each in left if each.state == State.FAILED]
            board.show()
            time.sleep(INTERVAL)
    finally:
        for each in left:
            if each.state == State.GOING:
                each.job.stop()
        board.close()


def _look(left: Sequence[Progress], launcher: Any, board: Board) -> None:
    """Which of the runs under way have ended, and how."""
    for each in left:
        if each.state == State.GOING and each.job.ended() is not None:
            launcher.forget(each.job)
            each.seconds = time.monotonic() - each.began
            each.state = State.DONE if each.job.ended() == 0 and finished(each.run) else State.FAILED
            board.tell(each)
        elif each.state == State.ELSEWHERE and finished(each.run):
            each.state = State.DONE
            board.tell(each)


def _start(left: Sequence[Progress], launcher: Any, board: Board) -> None:
    """Start as many as there are places for; those that another process has in work come last."""
    going = sum(each.state == State.GOING for each in left)
    for each in sorted(left, key=lambda each: each.state == State.ELSEWHERE):
        if going >= launcher.jobs or each.state not in (State.WAITING, State.ELSEWHERE):
            continue
        write_config(each.run)
        try:
            each.job = launcher.start(each.run.file(".yaml"), each.run.file(".log"), each.run.file(".lock"))
        except InWork:
            if each.state != State.ELSEWHERE:
                each.state = State.ELSEWHERE
                board.tell(each)
            continue
        each.state, each.began = State.GOING, time.monotonic()
        board.tell(each)
        going += 1


class Board:
    """Says how far the runs are: on a terminal a table that is drawn anew, elsewhere a line for each event."""

    def __init__(self, runs: Sequence[Progress], quiet: bool):
        self.runs = runs
        self.live = sys.stderr.isatty() and not quiet
        self.quiet = quiet
        self._lines = 0
        self._drawn = 0.0
        done = sum(each.state == State.DONE for each in runs)
        if done and not quiet:
            say(f"{done} of {counted(len(runs), 'run')} done before.", flush=True)

    def tell(self, each: Progress) -> None:
        """Say what has happened to a run."""
        if self.quiet or (self.live and each.state in (State.GOING, State.DONE)):
            return
        with self._above():
            done = sum(other.state == State.DONE for other in self.runs)
            time_taken = f" ({duration(each.seconds)})" if each.seconds else ""
            say(f"[{done} of {len(self.runs)} done] {each.run.title}: {each.state.value}{time_taken}", flush=True)
            if each.state == State.FAILED:
                say(f"  {each.run.file('.log')}: {last_words(each.run)}", flush=True)

    def show(self) -> None:
        """Draw the table, twice a second at most."""
        if not self.live or time.monotonic() - self._drawn < 1:
            return
        self._drawn = time.monotonic()
        with self._above():
            pass

    def close(self) -> None:
        self._clear()

    @contextmanager
    def _above(self) -> Iterator[None]:
        """What is printed inside comes above the table."""
        self._clear()
        yield
        if self.live:
            lines = self._table()
            print("\n".join(lines), file=sys.stderr, flush=True)
            self._lines = len(lines)

    def _clear(self) -> None:
        if self._lines:
            print(f"\x1b[{self._lines}F\x1b[J", end="", file=sys.stderr, flush=True)
        self._lines = 0

    def _table(self) -> list[str]:
        counts = [(state, sum(each.state == state for each in self.runs)) for state in State]
        head = ", ".join(f"{count} {state.value}" for state, count in counts if count)
        going = [each for each in self.runs if each.state == State.GOING]
        width = max((len(each.run.title) for each in going), default=0)
        lines = [f"{counted(len(self.runs), 'run')}: {head}"]
        for each in going[:10]:
            elapsed = duration(time.monotonic() - each.began)
            lines.append(f"  {plain(each.run.title):<{width}}  {each.tasks()}, {elapsed}")
        return lines


def last_words(run: Run) -> str:
    """The end of a run's log."""
    path = run.file(".log")
    if not path.is_file():
        return "it has no log"
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return plain(" / ".join(lines[-TOLD:]), 600) or "its log is empty"
