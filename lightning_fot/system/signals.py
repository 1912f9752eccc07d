"""Stopping a job in an orderly way: Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self


class Stopped(BaseException):
    """The user, or the machine, asked the job to stop. No ``Exception``, so that no library swallows it.

    Args:
        signum: The signal that asked.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a shell expects: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class StopGuard:
    """Turns signals into :class:`Stopped`: at once, or, while ``deferred``, where :meth:`check` is called.

    Training defers, since a step that is cut in the middle leaves a state that cannot be saved. A second signal stops
    at once all the same.

    Args:
        say: Told that the job will stop soon, when it is deferred.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, say: Callable[[str], None]) -> None:
        self.deferred = False
        self.pending: int | None = None
        self._say = say
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only, and refuses handlers elsewhere.
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def claim(self) -> None:
        """Takes the signals back from a library that has put its own handler before ours."""
        for number in self._before:
            signal.signal(number, self._handle)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.deferred and self.pending is None:
            self.pending = signum
            self._say("Stopping after this step and saving (press Ctrl-C again to stop at once, without saving) …")
            return
        self.pending = signum
        raise Stopped(signum)

    def check(self) -> None:
        """Stops here if a signal has come."""
        if self.pending is not None:
            raise Stopped(self.pending)
