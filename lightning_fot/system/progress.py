"""Progress of a long job made of phases, with an estimate of what is left over all of them.

Phases have costs in *token-passes* (tokens read by the model, or their equivalent in time). Speed is learnt while
running, per phase: the estimate of a phase under way uses its own speed, that of later phases the speed of all so far.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


def format_seconds(seconds: float) -> str:
    """Short duration: ``42s``, ``3m05s``, ``1h02m``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


@dataclass
class _Phase:
    name: str
    cost: float
    done: float = 0.0
    seconds: float = 0.0
    finished: bool = False
    started: float | None = None
    note: str = field(default="")


class JobProgress:
    """Live bar on a terminal; a plain line every few seconds elsewhere. Use it as a context manager.

    Args:
        console: Where to write; None makes one on standard error, so that standard output keeps the results.
        every_s: Seconds between plain lines.
        clock: Time source in seconds.
        first_speed: Token-passes a second assumed before any phase has run; None where costs are other units, and
            nothing is said of what is left until some of it is done.

    Example:
        >>> with JobProgress() as progress:  # doctest: +SKIP
        ...     progress.plan([("train", 1000.0)])
        ...     progress.start("train")
        ...     progress.advance(500.0, "step 1/2")
        ...     progress.finish("train")
    """

    def __init__(
        self,
        console: Console | None = None,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        first_speed: float | None = 700.0,
    ) -> None:
        self._console = console if console is not None else Console(file=sys.stderr)
        self._every = every_s
        self._clock = clock
        self._first_speed = first_speed
        self.beside = 1
        """So many phases go on at once: what is left takes so many times less."""
        self._phases: dict[str, _Phase] = {}
        self._current: _Phase | None = None
        self._began = clock()
        self._last_line = float("-inf")
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                # Names of documents may look like markup.
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[times]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("starting", total=1.0, times="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes the live bar off the screen; plain messages still work."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def plan(self, phases: Sequence[tuple[str, float]]) -> None:
        """Says what is to come; call it again when costs become known. Phases that are not named stay as they are.

        Args:
            phases: Name and cost in token-passes of each; 0 for one that will be skipped.
        """
        for name, cost in phases:
            phase = self._phases.setdefault(name, _Phase(name, 0.0))
            if not phase.finished:
                phase.cost = max(float(cost), phase.done)

    def start(self, name: str) -> None:
        """Begins a phase; one that was not planned gets the cost of one token-pass."""
        if self._current is not None:
            self.finish(self._current.name)
        phase = self._phases.setdefault(name, _Phase(name, 1.0))
        phase.started, phase.finished, phase.done = self._clock(), False, 0.0
        self._current = phase
        self._show(force=True)

    def advance(self, units: float, note: str = "") -> None:
        """Counts work done in the current phase.

        Args:
            units: Token-passes done since the last call.
            note: What to show beside the phase's name, such as ``step 3/20, loss 2.31``.
        """
        phase = self._current
        if phase is None:
            return
        phase.done += units
        phase.cost = max(phase.cost, phase.done)
        phase.note = note or phase.note
        self._show(force=False)

    def finish(self, name: str, seconds: float | None = None) -> None:
        """Ends a phase (all its work counts as done).

        Args:
            name: Of the phase.
            seconds: What it took, where it was not started here but went on beside others.
        """
        phase = self._phases.get(name)
        if phase is None or phase.finished:
            return
        if seconds is not None:
            phase.seconds = seconds
        elif phase.started is not None:
            phase.seconds = self._clock() - phase.started
        phase.finished, phase.done = True, phase.cost
        if self._current is phase:
            self._current = None
        self._show(force=True, ended=phase)

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @property
    def elapsed(self) -> float:
        """Seconds since this object was made."""
        return self._clock() - self._began

    def spent(self) -> dict[str, float]:
        """Seconds by kind of phase, its name's first word, for phases that have ended."""
        seconds: dict[str, float] = {}
        for phase in self._phases.values():
            if phase.finished:
                kind = phase.name.partition(" ")[0].rstrip(":")
                seconds[kind] = seconds.get(kind, 0.0) + phase.seconds
        return seconds

    def remaining(self) -> float | None:
        """Estimated seconds left over all phases; None while there is nothing to tell by."""
        now = self._clock()
        spent = done = 0.0
        for phase in self._phases.values():
            if phase.finished:
                spent, done = spent + phase.seconds, done + phase.cost
            elif phase.started is not None:
                spent, done = spent + now - phase.started, done + phase.done
        overall = done / spent if done > 0 and spent > 0 else self._first_speed
        if overall is None:
            return None
        left = 0.0
        for phase in self._phases.values():
            if phase.finished:
                continue
            speed, begun = overall, phase.started
            if begun is not None and phase.done > 0 and now > begun:
                speed = phase.done / (now - begun)
            left += (phase.cost - phase.done) / speed
        return left / self.beside

    def _fraction(self) -> float:
        total = sum(phase.cost for phase in self._phases.values())
        return sum(phase.done for phase in self._phases.values()) / total if total else 0.0

    def _show(self, force: bool, ended: _Phase | None = None) -> None:
        phase = ended or self._current
        if phase is None:
            return
        label = f"{phase.name}: {phase.note}" if phase.note else phase.name
        left = self.remaining()
        times = f"{format_seconds(self.elapsed)} gone"
        if left is not None:
            times += f", about {format_seconds(left)} left"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=label, completed=self._fraction(), times=times)
            return
        now = self._clock()
        if not force and now - self._last_line < self._every:
            return
        self._last_line = now
        if ended is not None:
            self.message(f"[{self._fraction():4.0%}] {label}: done in {format_seconds(ended.seconds)}; {times}")
        else:
            self.message(f"[{self._fraction():4.0%}] {label}; {times}")
