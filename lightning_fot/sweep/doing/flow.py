"""Cells one after the other or side by side: each claimed, done once, and its error noted while others go on."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.sweep.doing.cell import Cell, Place
from lightning_fot.sweep.folder import SweepFolder
from lightning_fot.system.progress import JobProgress

_LOOK_S = 1.0


@dataclass
class Unit:
    """Cells that belong together: one of a grid, or all of a trial.

    Args:
        cells: What is to be done, one or more.
        ended: Called once all of them have ended, with the first error, or None; not when the sweep is stopped.
        waits: Whether to wait for cells that another process is doing.
        held: Closed after ``ended``, or when the sweep is stopped.
    """

    cells: list[Cell]
    ended: Callable[[str | None], None] = lambda error: None
    waits: bool = False
    held: ExitStack = field(default_factory=ExitStack)
    left: int = field(init=False)
    error: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.left = len(self.cells)


@dataclass
class _Running:
    cell: Cell
    unit: Unit
    claim: ExitStack
    began: float


class Flow:
    """Does cells.

    Args:
        folder: Of the sweep.
        place: Where they are done.
        progress: Told what is begun and done.
        check: Called between cells; stops all by raising.
        failures: Errors by label, added to.
        busy: Labels of cells that other processes are doing, added to.
        debug: Show tracebacks of what fails.
    """

    def __init__(
        self,
        folder: SweepFolder,
        place: Place,
        progress: JobProgress,
        check: Callable[[], None],
        failures: dict[str, str],
        busy: list[str],
        debug: bool,
    ) -> None:
        self.folder, self.place, self.progress = folder, place, progress
        self._check, self._failures, self._busy, self._debug = check, failures, busy, debug
        self._running: dict[Any, _Running] = {}
        self._open: list[Unit] = []
        self._waiting: deque[tuple[Cell, Unit]] = deque()
        self._dry = False

    def do(self, more: Callable[[], Unit | None]) -> None:
        """Does all units.

        Args:
            more: The next unit; None where there is none now. Asked again after a unit has ended.
        """
        self._dry = False
        try:
            while True:
                self._check()
                self._begin()
                while not self._dry and len(self._open) < self.place.count and len(self._running) < self.place.count:
                    unit = more()
                    if unit is None:
                        self._dry = True
                    else:
                        self._open.append(unit)
                        self._waiting.extend((cell, unit) for cell in unit.cells)
                        self._begin()
                if self._running:
                    for ticket in self.place.ended(list(self._running)):
                        self._end(ticket)
                elif self._waiting:
                    # Another process is at them.
                    time.sleep(_LOOK_S)
                elif self._dry:
                    return
        finally:
            if self._running:
                self.place.stop(list(self._running))
            for running in self._running.values():
                running.claim.close()
            for unit in self._open:
                unit.held.close()
            self._running.clear()
            self._open.clear()
            self._waiting.clear()

    def _begin(self) -> None:
        """Begins cells that wait, as far as there is room."""
        for _ in range(len(self._waiting)):
            if len(self._running) >= self.place.count:
                return
            cell, unit = self._waiting.popleft()
            claim = ExitStack()
            if self._is_done(cell):
                self._one_less(unit)
            elif not claim.enter_context(self.folder.claim(cell.key)):
                if unit.waits:
                    self._waiting.append((cell, unit))
                    continue
                self._busy.append(cell.label)
                self._one_less(unit)
            elif self._is_done(cell):
                # Another process has finished it since.
                claim.close()
                self._one_less(unit)
            else:
                self._start(cell, unit, claim)

    def _start(self, cell: Cell, unit: Unit, claim: ExitStack) -> None:
        try:
            if self.place.count == 1:
                self.progress.start(cell.label)
            else:
                self.progress.message(f"{cell.label}: begun")
            ticket = self.place.begin(cell)
        except BaseException:
            claim.close()
            raise
        self._running[ticket] = _Running(cell, unit, claim, time.monotonic())

    def _is_done(self, cell: Cell) -> bool:
        return cell.is_done(self.folder.read(cell.key))

    def _end(self, ticket: Any) -> None:
        """Takes in a cell that has ended."""
        running = self._running[ticket]
        cell = running.cell
        try:
            self.place.result(ticket)
        except (SettingError, MissingLibraryError, RuntimeError, ValueError, OSError, MemoryError) as error:
            if self._debug:
                traceback.print_exception(error)
            said = f"{type(error).__name__}: {error}"
            self._failures[cell.label] = said
            running.unit.error = running.unit.error or said
            self.folder.write(cell.key, {**(self.folder.read(cell.key) or {}), "error": said})
            self.progress.message(f"{cell.label} failed: {error}")
        del self._running[ticket]
        running.claim.close()
        self.progress.finish(cell.label, None if self.place.count == 1 else time.monotonic() - running.began)
        self._one_less(running.unit)

    def _one_less(self, unit: Unit) -> None:
        """Counts a cell that has ended, and ends the unit with its last one."""
        unit.left -= 1
        if unit.left:
            return
        self._open.remove(unit)
        with unit.held:
            unit.ended(unit.error)
        self._dry = False
