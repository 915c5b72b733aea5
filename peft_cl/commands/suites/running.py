"""Running a suite: what is left to do, one run after the other or several at once, and how far it is."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ...disk import replacing
from ...metrics import RunResults
from ...metrics.results import FILE_NAME
from ...text import counted, duration, plain
from ..errors import CommandError
from ..options import read_config, write_yaml
from ..output import say
from .launchers import InWork, Job
from .suite import Run, Suite


#: Seconds between two looks at what goes on.
INTERVAL = 0.5
#: Lines of a failed run's log that are told.
TOLD = 3
#: Columns of a terminal for how far a run is, beside its title.
ROOM = 36


class State(Enum):
    WAITING = "waiting"
    ELSEWHERE = "in work elsewhere"
    GOING = "going"
    DONE = "done"
    FAILED = "failed"


@dataclass
class Progress:
    """How far a run is; `log_before` are the bytes of its log that earlier attempts wrote."""

    run: Run
    state: State = State.WAITING
    job: Job | None = None
    began: float = 0.0
    log_before: int = 0
    seconds: float = 0.0

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
    before = read_config(path)
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
        aside.write_text(write_yaml(run.config), encoding="utf-8")


def run_all(suite: Suite, launcher: Any, quiet: bool = False) -> list[Run]:
    """Do the runs that are not through; returns those that failed.

    An interruption ends the runs under way, which go on from their last finished task when the suite is run again.
    """
    left = [Progress(run, State.DONE if finished(run) else State.WAITING) for run in suite.runs]
    board = Board(left, quiet)
    with _sigterm_interrupts():
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


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Inside the block `kill`, or a batch system at its limit, ends the runs too, as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
        if finished(each.run):  # by another command, in the meantime
            each.state = State.DONE
            board.tell(each)
            continue
        if each.state == State.WAITING:  # of one in work elsewhere it lies there, and this comes twice a second
            write_config(each.run)
        log = each.run.file(".log")
        each.log_before = log.stat().st_size if log.is_file() else 0
        try:
            each.job = launcher.start(each.run.file(".yaml"), log, each.run.file(".lock"))
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
                say(f"  {ending(each)}{each.run.file('.log')}: {last_words(each)}", flush=True)

    def show(self) -> None:
        """Draw the table, once a second at most."""
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
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be taken back
            lines = [fitted(line, width) for line in self._table(width)]
            print("\n".join(lines), file=sys.stderr, flush=True)
            self._lines = len(lines)

    def _clear(self) -> None:
        if self._lines:
            print(f"\x1b[{self._lines}F\x1b[J", end="", file=sys.stderr, flush=True)
        self._lines = 0

    def _table(self, width: int) -> list[str]:
        counts = [(state, sum(each.state == state for each in self.runs)) for state in State]
        head = ", ".join(f"{count} {state.value}" for state, count in counts if count)
        going = [each for each in self.runs if each.state == State.GOING]
        titles = [fitted(plain(each.run.title), max(10, width - ROOM)) for each in going]
        longest = max(map(columns, titles), default=0)
        lines = [f"{counted(len(self.runs), 'run')}: {head}"]
        for each, title in list(zip(going, titles, strict=True))[:10]:
            elapsed = duration(time.monotonic() - each.began)
            lines.append(f"  {title}{' ' * (longest - columns(title))}  {each.tasks()}, {elapsed}")
        return lines


def columns(text: str) -> int:
    """How many columns of a terminal a text takes: letters of some scripts take two."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def fitted(text: str, width: int) -> str:
    """The text, cut to so many columns of a terminal."""
    if columns(text) <= width:
        return text
    while columns(text) > width - 1:
        text = text[:-1]
    return f"{text}…"


def ending(each: Progress) -> str:
    """Which signal ended a run's process, if one did: its log says nothing of it."""
    status = each.job.ended()
    if status is None or status >= 0:
        return ""
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    memory = ", as the system does where memory runs out" if name == "SIGKILL" else ""
    return f"ended by {name}{memory}; "


def last_words(each: Progress) -> str:
    """The end of what a run's last attempt wrote into its log."""
    path = each.run.file(".log")
    if not path.is_file():
        return "it has no log"
    text = path.read_bytes()[each.log_before :].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return plain(" / ".join(lines[-TOLD:]), 600) or "its log is empty"
