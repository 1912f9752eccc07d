"""Work away from the caller: one thread for all retrievers of a process, alive only while there is work."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch

OwnerT = TypeVar("OwnerT")


class StoppedError(Exception):
    """A job ends early: nobody wants its result any more, or the process ends."""


class Job(Generic[OwnerT]):
    """Work that is done once, in whatever thread, and looked at later.

    Nothing of it is seen by those who wait for the result before they take it: a job that is dropped changes nothing.

    Args:
        work: Called with the job, without gradients; it may call :meth:`check` at points where it can end early.

    Attributes:
        wanted_by: Who waits for the result, held weakly: when all are gone the job ends early.
        error: What the work raised.
        seconds: Time that it took.
        begun: Whether the work has begun.
    """

    def __init__(self, work: Callable[[Any], None]) -> None:
        self.wanted_by: WeakSet[OwnerT] = WeakSet()
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.begun = False
        self._work: Callable[[Any], None] | None = work
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        """Whether the work has ended, in whatever way."""
        return self._done.is_set()

    def check(self) -> None:
        """Called by the work: may it go on?

        Raises:
            StoppedError: It may not.
        """
        if not len(self.wanted_by) or not threading.main_thread().is_alive():
            raise StoppedError

    def waiting(self) -> OwnerT:
        """One of those who wait for the result.

        Raises:
            StoppedError: Nobody does.
        """
        for owner in self.wanted_by:
            return owner
        raise StoppedError

    def release(self, owner: OwnerT) -> None:
        """``owner`` does not want the result any more."""
        self.wanted_by.discard(owner)

    def finish(self) -> None:
        """Waits until work that has begun has ended; what has not begun is called off."""
        if _worker.take_back(self):
            self.abandon()
        self._done.wait()

    def run(self) -> None:
        """Does the work in this thread."""
        began, work, before = perf_counter(), self._work, getattr(_current, "job", None)
        _current.job, self.begun = self, True
        try:
            self.check()
            assert work is not None
            with torch.no_grad():
                work(self)
        except BaseException as error:
            self.error = error
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            _current.job = before
            # What the work holds on to (a snapshot of the keys) goes with it.
            self._work = None
            self.seconds = perf_counter() - began
            self._done.set()

    def abandon(self) -> None:
        """Ends without a result: what did the work is not there any more, or will not begin."""
        self.error, self._work = StoppedError(), None
        # After a fork of the process the old event may be locked by a thread that this process lacks.
        self._done = threading.Event()
        self._done.set()


class _Current(threading.local):
    job: Job[Any] | None = None


_current = _Current()


def check_job() -> None:
    """To be called now and then by slow work in pure Python, such as ``Index.add``: ends it when nobody wants it.

    Outside a job nothing happens.

    Raises:
        StoppedError: The job that calls is not wanted any more. It is to be let through.
    """
    if _current.job is not None:
        _current.job.check()


def in_background() -> bool:
    """Whether this thread is the one that works beside the callers."""
    return threading.current_thread() is _worker.thread


class _Worker:
    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.running: Job[Any] | None = None
        self._lock = threading.Lock()
        self._waiting: deque[Job[Any]] = deque()

    def submit(self, job: Job[Any]) -> None:
        with self._lock:
            self._waiting.append(job)
            if self.thread is not None:
                return
            # Not a daemon: a thread that is killed inside a library takes the process with it.
            thread = threading.Thread(target=self._work_off, name="lightning-fot-builds", daemon=False)
            try:
                thread.start()
            except RuntimeError:  # no threads any more: the interpreter ends
                self._waiting.remove(job)
                job.abandon()
                return
            self.thread = thread

    def take_back(self, job: Job[Any]) -> bool:
        """Removes a job that has not begun; whether it had not."""
        with self._lock:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
            return True

    def _work_off(self) -> None:
        while True:
            with self._lock:
                self.running = None
                if not threading.main_thread().is_alive():
                    # The interpreter waits for this thread alone: what has not begun never will.
                    while self._waiting:
                        self._waiting.popleft().abandon()
                if not self._waiting:
                    self.thread = None
                    return
                job = self.running = self._waiting.popleft()
            job.run()
            # Held no longer than needed: a result may be large.
            del job

    def forget(self) -> None:
        """In a forked child: the thread is not there, nor will its jobs end."""
        jobs = [*self._waiting, *([self.running] if self.running else [])]
        for job in jobs:
            job.abandon()
        self.__init__()  # type: ignore[misc]


_worker = _Worker()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.forget)


def submit(job: Job[Any]) -> None:
    """Hands a job to the thread, behind those that wait already."""
    _worker.submit(job)


class Gate:
    """Lets many search, or one change: an index is not searched while it is extended.

    Searches go first, but a change that waits for long gets its turn between two of them.
    """

    _PATIENCE = 0.05

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._searching = 0
        self._changing = False
        self._insisting = False

    def enter(self) -> None:
        """Before a search."""
        with self._condition:
            while self._changing or self._insisting:
                self._condition.wait()
            self._searching += 1

    def leave(self) -> None:
        """After a search."""
        with self._condition:
            self._searching -= 1
            if not self._searching:
                self._condition.notify_all()

    def __enter__(self) -> None:
        """Before a change."""
        with self._condition:
            until = perf_counter() + self._PATIENCE
            while self._searching or self._changing:
                self._insisting = perf_counter() > until
                self._condition.wait(self._PATIENCE)
            self._insisting, self._changing = False, True

    def __exit__(self, *error: object) -> None:
        """After a change."""
        with self._condition:
            self._changing = False
            self._condition.notify_all()
