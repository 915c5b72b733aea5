"""One call of a model at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class CallLock:
    """Lets one thread into the prompted model at a time; others wait.

    During a call the prefix is handed to the base model's own attention modules, so two threads (a web server's, for
    instance) would see each other's prompts. A copy of the model, or one from a pickle, has a lock of its own.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.owner: int | None = None
        self.keeps = False

    def __reduce__(self) -> tuple:
        return CallLock, ()

    def acquire(self) -> None:
        if torch.compiler.is_compiling():  # a program that is traced has no threads yet
            return
        me = threading.get_ident()
        # A call never contains another: if this thread holds the lock already, its last call was cut off (Ctrl-C).
        if self.owner != me:
            self.lock.acquire()
            self.owner = me

    def release(self) -> None:
        """Does nothing in a thread that does not hold it: the hook that calls this runs after every failure."""
        if torch.compiler.is_compiling():
            return
        if self.owner == threading.get_ident() and not self.keeps:
            self.owner = None
            self.lock.release()

    @contextmanager
    def held(self) -> Iterator[None]:
        """For the length of the block. Inside a call of the model, whose lock it is already, nothing happens."""
        if torch.compiler.is_compiling() or self.owner == threading.get_ident():
            yield
            return
        self.acquire()
        try:
            yield
        finally:
            self.release()

    @contextmanager
    def held_throughout(self) -> Iterator[None]:
        """For the length of the block, over several calls of the model: none of them releases it."""
        self.acquire()
        self.keeps = True
        try:
            yield
        finally:
            self.keeps = False
            self.release()
