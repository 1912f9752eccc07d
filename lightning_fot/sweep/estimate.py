"""How long the rest of a sweep may take, told from its cells that are done."""

from __future__ import annotations

from lightning_fot.system.progress import format_seconds


class Spent:
    """Adds up work of cells, by kind, and the seconds that the finished ones took.

    Example:
        >>> spent = Spent()
        >>> spent.add("hnsw", 100.0, 0.0, 5.0)
        >>> spent.add("hnsw", 200.0, 1.0, None)
        >>> print(spent)
        1 of 2 cells to do: about 10s, told from the cells that are done
    """

    def __init__(self) -> None:
        self.unknown = False
        self._done: dict[str, tuple[float, float]] = {}
        self._left: dict[str, float] = {}
        self._cells = self._open = 0

    def add(self, kind: str, cost: float, missing: float, seconds: float | None) -> None:
        """Counts a cell.

        Args:
            kind: Cells of one kind cost alike.
            cost: Its work, in any unit.
            missing: Share of it that is still to do.
            seconds: What the rest has taken; None where nothing was done.
        """
        self._cells += 1
        self._open += missing > 0
        if missing:
            self._left[kind] = self._left.get(kind, 0.0) + cost * missing
        if seconds is not None and missing < 1:
            work, before = self._done.get(kind, (0.0, 0.0))
            self._done[kind] = (work + cost * (1 - missing), before + seconds)

    @property
    def seconds(self) -> float | None:
        """Seconds left; None where no cell of a kind that is left was done, so that nobody knows."""
        if self.unknown or any(not self._done.get(kind, (0.0, 0.0))[0] for kind in self._left):
            return None
        return sum(work * self._done[kind][1] / self._done[kind][0] for kind, work in self._left.items())

    def __str__(self) -> str:
        if self.unknown:
            return "How many layers and heads there are is known after recording: the plan then tells all cells."
        said = f"{self._open} of {self._cells} cells to do"
        if not self._open:
            return said
        if self.seconds is None:
            return f"{said}: how long is known once a cell of each kind is done"
        return f"{said}: about {format_seconds(self.seconds)}, told from the cells that are done"
