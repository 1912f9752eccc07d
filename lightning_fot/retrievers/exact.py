"""Exact search: the fastest way to score every key, by the number of queries and keys."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_fot.retrievers.base import Retriever
from lightning_fot.retrievers.keys.int8_scan import best_of_coded, few, fits
from lightning_fot.retrievers.keys.scan import Block, best_of, topk_blocks

_ENOUGH_ROWS = 8192


class ExactRetriever(Retriever):
    """Scores every key: the reference the others are measured against, and the fastest below about 8k keys a bank.

    Args:
        dim: Head size D.
        banks: Independent key sets.
        **kwargs: Those of :class:`Retriever`; none changes the result.

    Example:
        >>> import torch
        >>> retriever = ExactRetriever(dim=2)
        >>> retriever.add(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]]))
        >>> retriever.search(torch.tensor([[[1.0, 0.1]]]), k=2).tolist()
        [[[0, 2]]]
    """

    exact: ClassVar[bool] = True

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._store.code_bytes

    def _scan(self, bank: int, queries: Tensor, k: int) -> Tensor:
        if not 0 < len(queries) <= few(self.dim):
            return super()._scan(bank, queries, k)
        self._stats.rows_scanned += len(queries) * self._store.lengths_list[bank]
        removed = self._removed.mask(bank)
        found: list[tuple[Tensor, Tensor]] = []
        plain: list[Block] = []
        for block, book in self._store.scan_coded(bank):
            size = len(block.keys)
            coded = book.upto(block.keys) if book is not None and size >= _ENOUGH_ROWS and fits(size, k) else None
            if coded is None:
                plain.append(block)
                continue
            mask = None if removed is None else removed[block.start :]
            rows, scores, unanswered = best_of_coded(queries, coded, block.keys, k, mask)
            if unanswered:
                rows[unanswered], scores[unanswered] = topk_blocks(queries[unanswered], [Block(0, block.keys)], k, mask)
            if block.start:
                rows = rows + block.start if mask is None else torch.where(rows < 0, rows, rows + block.start)
            found.append((rows, scores))
        if plain or not found:
            found.append(topk_blocks(queries, plain, k, removed))
        if len(found) == 1:
            return found[0][0]
        return best_of(torch.cat([part[0] for part in found], 1), torch.cat([part[1] for part in found], 1), k)[0]
