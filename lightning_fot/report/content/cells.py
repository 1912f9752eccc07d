"""What tables are made of."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_fot.report.content import curves, formats, read


@dataclass(frozen=True)
class Cell:
    """A value as shown, and as it is for sorting and for the CSV file."""

    text: str
    raw: Any = None
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """Columns and rows of cells.

    Attributes:
        title: What it shows.
        columns: Headings.
        rows: As many cells as columns each.
        words: How many columns from the left hold words; the others hold numbers.
        note: What the reader has to know.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: int = 1
    note: str = ""


def by_context(
    title: str,
    table: dict[str, dict[int, read.Row]],
    contexts: list[int],
    cell: Callable[[read.Row], Cell],
    note: str,
) -> Table:
    """A row a memory kind, a column a context length; a dash where a kind was not measured."""
    body = tuple(
        (
            Cell(curves.memory_name(kind), kind),
            *(cell(cells[context]) if context in cells else Cell(formats.MISSING) for context in contexts),
        )
        for kind, cells in table.items()
    )
    return Table(title, ("memory", *(formats.tokens(context) for context in contexts)), body, note=note)


def table_as_csv(table: Table) -> str:
    """A table as CSV, its values unrounded."""
    return _csv(table.columns, ([cell.raw for cell in row] for row in table.rows))


def rows_as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with a column for every field of any; settings are JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    body = ([row.get(name) for name in names] for row in rows)
    return _csv(names, ([json.dumps(cell) if isinstance(cell, dict | list) else cell for cell in row] for row in body))


def _csv(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return buffer.getvalue()
