"""Where the runs of a suite are done: processes of this machine, or jobs of a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ..errors import CommandError, explained
from ..importing import as_words


try:
    import fcntl
except ImportError:  # on Windows, where nothing keeps two suites from one run
    fcntl = None

#: Seconds that a process has to end after it was asked to.
PATIENCE = 20


class Job(Protocol):
    """A run that was started."""

    def ended(self) -> int | None:
        """The exit status, None while it goes on."""

    def stop(self) -> None:
        """End it, and wait until it has."""


class InWork(Exception):
    """Another process has the run in work."""


def in_work(lock: Path) -> bool:
    """Whether a process holds the lock of a run."""
    if fcntl is None or not lock.is_file():
        return False
    with open(lock, "a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def words_of(config: Path) -> list[str]:
    """The command of a run, which goes on where it was interrupted."""
    return [sys.executable, "-m", "peft_cl.cli", "train", str(config), "--resume", *as_words()]


class LocalJob:
    """A process of this machine. It holds a lock on its run as long as it lives, whatever becomes of its parent."""

    def __init__(self, words: list[str], log: Path, lock: Path, environment: dict[str, str]):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "a") as held, open(log, "ab") as output:
            if fcntl is not None:
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise InWork(str(lock)) from None
            kept = [held.fileno()] if fcntl is not None else []
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=kept,
                start_new_session=True,  # an interruption reaches it through `stop` alone, once
            )

    def ended(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class LocalLauncher:
    """Processes of this machine, `jobs` at a time, which share its cores and GPUs."""

    def __init__(self, jobs: int):
        self.jobs = jobs
        self.gpus = _gpus()
        self._places = list(range(jobs))
        self._taken: dict[int, int] = {}

    def start(self, config: Path, log: Path, lock: Path) -> Job:
        taken = set(self._taken.values())
        place = next(each for each in self._places if each not in taken)
        environment = dict(os.environ)
        if self.jobs > 1:
            threads = max(1, (os.cpu_count() or 1) // self.jobs)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        if self.gpus:  # one for each process: several to one process are refused
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[place % len(self.gpus)]
        job = LocalJob(words_of(config), log, lock, environment)
        self._taken[id(job)] = place
        return job

    def forget(self, job: Job) -> None:
        """Its place is free."""
        self._taken.pop(id(job), None)


def _gpus() -> list[str]:
    """The names of the GPUs that processes may have."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


class SubmitItJob:
    """A job that submitit has submitted."""

    def __init__(self, job: Any):
        self.job = job

    def ended(self) -> int | None:
        if not self.job.done():
            return None
        return 0 if self.job.exception() is None else 1

    def stop(self) -> None:
        self.job.cancel(check=False)


class SubmitItLauncher:
    """Jobs of a cluster by submitit: `slurm`, or `local`, its processes on this machine."""

    def __init__(self, cluster: str, folder: Path, jobs: int, options: dict[str, Any]):
        try:
            import submitit
        except ImportError as error:
            raise CommandError(
                f"--launcher {cluster} needs the package submitit. Install it: pip install 'peft-cl[slurm]'."
            ) from error
        self.jobs = jobs
        with explained(f"--launcher {cluster} does not work here"):
            self.executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
            self.executor.update_parameters(name="peft-cl", **options)

    def start(self, config: Path, log: Path, lock: Path) -> Job:
        log.parent.mkdir(parents=True, exist_ok=True)
        return SubmitItJob(self.executor.submit(work, words_of(config), str(log), str(lock)))

    def forget(self, job: Job) -> None:
        pass


def work(words: list[str], log: str, lock: str) -> None:
    """What a job of a cluster does: the run, in a process of its own."""
    status = LocalJob(words, Path(log), Path(lock), dict(os.environ)).process.wait()
    if status:
        raise RuntimeError(f"{' '.join(words)} ended with {status}; see {log}")


def make_launcher(name: str, jobs: int, folder: Path, options: Sequence[tuple[str, Any]]) -> Any:
    """The launcher of a name: `processes`, `slurm`, or `submitit` (its processes on this machine)."""
    if name == "processes":
        if options:
            raise CommandError(
                f"--launcher-option {options[0][0]} is for a cluster, but the runs are processes of this machine. "
                "Leave it out, or give --launcher slurm."
            )
        return LocalLauncher(jobs)
    return SubmitItLauncher("local" if name == "submitit" else name, folder, jobs, dict(options))
