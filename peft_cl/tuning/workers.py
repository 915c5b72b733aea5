"""Trials one after the other in this process, or several at once in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from optuna.trial import Trial

from .search import FAILED, FINISHED, Attempt, Outcome, Row, Search


#: Told of a task that was measured (number of the trial, step, value), and of a trial that is over.
HeardTask = Callable[[int, int, float], None]
HeardTrial = Callable[[Row], None]
#: Seconds that a process without a trial has to end by itself.
PATIENCE = 10


@dataclass(frozen=True)
class Runner:
    """Runs the trials of a search.

    Args:
        search: The search.
        metric: Name of the metric that trials are judged by.
        trials: Number of trials in all.
        on_task, on_trial: Told of what is measured.
    """

    search: Search
    metric: str
    trials: int
    on_task: HeardTask
    on_trial: HeardTrial

    def here(self, attempt: Attempt) -> None:
        """Run them in this process."""
        while self._has_more():
            trial = self.search.next()
            watch = lambda step, value, trial=trial: self._measured(trial, step, value)  # noqa: E731
            outcome = attempt(self.search.number(trial), self.search.settings(trial), watch)
            self._end(trial, outcome)

    def in_processes(self, make_attempt: Callable[[], Attempt], surroundings: Sequence[Mapping[str, str]]) -> None:
        """Run so many at once, each in a process.

        Args:
            make_attempt: Called in each process, which it is sent to.
            surroundings: Variables of the environment of each process, of which there are as many.
        """
        workers = [Worker(make_attempt, variables) for variables in surroundings]
        try:
            for worker in workers:
                self._begin(worker)
            while busy := [worker for worker in workers if worker.trial is not None]:
                for connection in wait([worker.connection for worker in busy]):
                    self._hear(next(worker for worker in busy if worker.connection is connection))
        finally:
            for worker in workers:
                worker.end()

    def _has_more(self) -> bool:
        return self.search.begun < self.trials or self.search.waiting > 0

    def _begin(self, worker: Worker) -> None:
        if self._has_more():
            trial = self.search.next()
            worker.give(trial, self.search.number(trial), self.search.settings(trial))

    def _hear(self, worker: Worker) -> None:
        trial = worker.trial
        try:
            said = worker.connection.recv()
        except (EOFError, OSError):
            said = Outcome(FAILED, reason=worker.fate())
        if not isinstance(said, Outcome):
            step, value = said
            worker.answer(self._measured(trial, step, value))
            return
        worker.trial = None
        self._end(trial, said)
        if said.state == FAILED:
            worker.end()  # whatever it left behind, in memory or on the device, goes with it
        self._begin(worker)

    def _measured(self, trial: Trial, step: int, value: float) -> bool:
        self.on_task(self.search.number(trial), step, value)
        return self.search.report(trial, step, value)

    def _end(self, trial: Trial, outcome: Outcome) -> None:
        value = outcome.metrics[self.metric] if outcome.state == FINISHED else None
        self.on_trial(self.search.tell(trial, outcome, value))


class Worker:
    """A process that makes trials, one at a time; it is started when it gets one.

    Args:
        make_attempt: Makes what makes trials, in the process.
        variables: What is added to the environment of the process.
    """

    def __init__(self, make_attempt: Callable[[], Attempt], variables: Mapping[str, str]):
        self.make_attempt, self.variables = make_attempt, variables
        self.process: BaseProcess | None = None
        self.connection: Connection | None = None
        self.trial: Trial | None = None

    def give(self, trial: Trial, number: int, settings: Mapping[str, Any]) -> None:
        if self.process is None:
            self._start()
        self.trial = trial
        self.answer((number, settings))

    def answer(self, said: Any) -> None:
        try:
            self.connection.send(said)
        except OSError:
            pass  # the process has ended, which is found when it is listened to

    def fate(self) -> str:
        self.process.join()
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"its process was ended by signal {-code} ({signal.Signals(-code).name})"
        return f"its process ended with status {code}"

    def end(self) -> None:
        """End the process: one without a trial by itself, another where it is."""
        if self.process is not None:
            self.connection.close()
            self.process.join(0 if self.trial else PATIENCE)
            self.process.terminate()
            self.process.join()
            self.process = self.connection = None

    def _start(self) -> None:
        # Spawned, not forked: a process that has used a GPU cannot be forked.
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.make_attempt), daemon=False)
        with _environment(self.variables):
            self.process.start()
        other.close()  # so that the end of the process is the end of the connection


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What is started in the block has these variables: torch reads them when it is imported."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def surroundings(jobs: int, given: Mapping[str, str], cores: int, devices: int) -> list[dict[str, str]]:
    """Variables of the environment of each of the processes: cores are divided among them, GPUs dealt out in turn.

    Args:
        jobs: Number of processes.
        given: The environment; what is set there of threads stays.
        cores: Number of cores.
        devices: Number of GPUs visible.

    Example:
        >>> surroundings(3, {}, 8, 2)[1:]
        [{'OMP_NUM_THREADS': '2', 'CUDA_VISIBLE_DEVICES': '1'}, {'OMP_NUM_THREADS': '2', 'CUDA_VISIBLE_DEVICES': '0'}]
    """
    threads = {} if "OMP_NUM_THREADS" in given else {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    if devices < 2:  # all share the one
        return [dict(threads) for _ in range(jobs)]
    visible = [name for name in given.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = visible or [str(device) for device in range(devices)]
    return [{**threads, "CUDA_VISIBLE_DEVICES": names[job % len(names)]} for job in range(jobs)]


def _serve(connection: Connection, make_attempt: Callable[[], Attempt]) -> None:
    """The life of such a process: trials as they are given, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal interrupts all; the first process ends the others
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())

    def watch(step: int, value: float) -> bool:
        try:
            connection.send((step, value))
            return connection.recv()
        except (EOFError, OSError):
            sys.exit()

    attempt = make_attempt()
    while True:
        try:
            number, settings = connection.recv()
            connection.send(attempt(number, settings, watch))
        except (EOFError, OSError):
            return
