"""What local keys were rotated with, so that the rotation can be taken off when a window moves."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fot.model.attention.rotary import Embeddings


class Angles:
    """(cos, sin) of the local columns, shared by all layers that are given the same embeddings.

    Only references are kept while tokens come one by one; they are joined when somebody asks.
    """

    def __init__(self) -> None:
        self._parts: list[Embeddings] = []
        self._width = 0

    def put(self, start: int, embeddings: Embeddings) -> None:
        """Columns from ``start`` on are rotated with (cos, sin), each (B or 1, n, R); what was there is replaced."""
        if start != self._width:
            self._parts = [self.first(start)] if start else []
        self._parts.append(embeddings)
        self._width = start + embeddings[0].shape[1]

    def first(self, width: int) -> Embeddings:
        """(cos, sin) of the first columns, each (B or 1, width, R)."""
        if len(self._parts) > 1:
            rows = max(part[0].shape[0] for part in self._parts)
            wide = [tuple(half.expand(rows, -1, -1) for half in part) for part in self._parts]
            self._parts = [(torch.cat([part[0] for part in wide], 1), torch.cat([part[1] for part in wide], 1))]
        cos, sin = self._parts[0]
        return cos[:, :width], sin[:, :width]

    def arrange(self, columns: Tensor, moved: bool) -> None:
        """Makes the columns (B, n) int64, chosen for each row, the local ones, in that order.

        Args:
            columns: Columns of each row.
            moved: Positions have changed: the next forward brings the angles of all columns.
        """
        if moved or not self._parts:
            self._parts, self._width = [], 0
            return
        cos, sin = (
            half.expand(len(columns), -1, -1).gather(
                1, columns.to(half.device)[..., None].expand(-1, -1, half.shape[2])
            )
            for half in self.first(self._width)
        )
        self._parts, self._width = [(cos, sin)], columns.shape[1]

    def select(self, rows: Tensor) -> None:
        """Makes row i what row ``rows[i]`` is; there may be more rows than before."""
        for number, (cos, sin) in enumerate(self._parts):
            if cos.shape[0] > 1:
                index = rows.to(cos.device)
                self._parts[number] = cos.index_select(0, index), sin.index_select(0, index)
