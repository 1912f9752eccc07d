"""What all cells of a sweep have in common, and what can do them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lightning_fot.sweep.folder import SweepFolder


class Cell(Protocol):
    """A measurement, or a run."""

    @property
    def key(self) -> str:
        """Name of its file."""
        ...

    @property
    def label(self) -> str:
        """For the screen."""
        ...

    @property
    def cost(self) -> float:
        """Rough work, to tell how much is left."""
        ...

    def is_done(self, known: Mapping[str, Any] | None) -> bool:
        """Whether nothing is left to do of what is known."""
        ...

    def do(self, folder: SweepFolder, check: Callable[[], None]) -> None:
        """Does what is left, and keeps it in the folder; what ``check`` raises loses nothing."""
        ...


class Place(Protocol):
    """Where cells are done."""

    count: int
    """So many at once."""

    def begin(self, cell: Cell) -> Any:
        """Begins a cell; gives a ticket."""
        ...

    def ended(self, tickets: Sequence[Any]) -> list[Any]:
        """Those of some tickets whose cells have ended; may wait a moment."""
        ...

    def result(self, ticket: Any) -> None:
        """Raises what went wrong with a cell that has ended, if anything did."""
        ...

    def stop(self, tickets: Sequence[Any]) -> None:
        """Has cells end soon, and waits until they have; what they have kept stays."""
        ...


class Here:
    """This process: one cell at a time.

    Args:
        folder: Of the sweep.
        check: Called between settings of a cell; stops it by raising.
    """

    count = 1

    def __init__(self, folder: SweepFolder, check: Callable[[], None]) -> None:
        self._folder, self._check = folder, check
        self._begun: dict[str, Cell] = {}

    def begin(self, cell: Cell) -> str:
        """Puts it off: it is done when its result is asked for."""
        self._begun[cell.key] = cell
        return cell.key

    def ended(self, tickets: Sequence[str]) -> list[str]:
        """All of them."""
        return list(tickets)

    def result(self, ticket: str) -> None:
        """Does the cell."""
        self._begun.pop(ticket).do(self._folder, self._check)

    def stop(self, tickets: Sequence[str]) -> None:
        """Nothing runs beside this process."""
