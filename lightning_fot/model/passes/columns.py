"""How far the local window of a text has come: what its layers read, and the cache of all layers changes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Columns:
    """Counts of columns, which all rows and all layers share.

    Args:
        window: The most local columns of a row.
        seen: Columns of text read, those in memory included.
        committed: Local columns before the forward in progress.
        rotated: Columns whose rotated keys the forward in progress can use again.
    """

    window: int
    seen: int = 0
    committed: int = 0
    rotated: int = 0
