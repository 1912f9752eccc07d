"""Exact top-k by inner product, in blocks, and exact rescoring of candidates: pure functions on torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_GROUP = 32
_KEY_BLOCK = 65536
_SMALL_BLOCK = 8192
_SCORE_BUDGET = 1 << 22  # scores held at a time: 16 MB of fp32


def topk_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-k of each row in two levels: exact, and several times faster than ``topk`` on long rows.

    The k largest of a row lie in the k groups with the largest maxima. Groups are strided so that the maximum
    vectorises.

    Args:
        scores: (Q, N) float, contiguous.
        k: At most N.

    Returns:
        Values and column numbers, each (Q, k), best first.
    """
    n = scores.shape[1]
    groups = n // _GROUP
    if groups < 4 * k:
        values, columns = scores.topk(k, dim=1)
        return values, columns
    body = scores[:, : groups * _GROUP].view(-1, _GROUP, groups)
    best_groups = body.amax(dim=1).topk(k, dim=1, sorted=False).indices
    offsets = torch.arange(_GROUP, device=scores.device) * groups
    columns = (best_groups.unsqueeze(1) + offsets.view(1, -1, 1)).flatten(1)
    if n > groups * _GROUP:
        rest = torch.arange(groups * _GROUP, n, device=scores.device).expand(scores.shape[0], -1)
        columns = torch.cat((columns, rest), dim=1)
    values, picked = scores.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, picked)


def topk_rows(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact neighbours of each query by inner product.

    Args:
        queries: (Q, D) float32.
        keys: (N, D), any floating dtype; scored in float32.
        k: Neighbours wanted.

    Returns:
        Row numbers (Q, min(k, N)) int64 and scores float32, best first.
    """
    size = block_size(queries.shape[0], keys.shape[0])
    pieces = (Block(start, keys[start : start + size]) for start in range(0, keys.shape[0], size))
    return topk_blocks(queries, pieces, k)


@dataclass(frozen=True)
class Block:
    """Keys that are scored together: as they are, or in eight bits (:class:`~lightning_fot.retrievers.quantiser`).

    Args:
        start: Row number of the first.
        keys: (n, D), any floating dtype, or int8 codes.
        scales: (n,) float16 of codes.
        spread: (D,) float32 of codes.
        centre: (D,) float32 of codes.
    """

    start: int
    keys: Tensor
    scales: Tensor | None = None
    spread: Tensor | None = None
    centre: Tensor | None = None

    def scores(self, queries: Tensor) -> Tensor:
        """Inner products (Q, n) float32 with queries (Q, D) float32."""
        if self.scales is None or self.spread is None or self.centre is None:
            return queries @ self.keys.float().T
        # What belongs to a coordinate goes to the query: the codes themselves are multiplied once.
        scores = (queries * self.spread) @ self.keys.float().T
        return scores.mul_(self.scales.float()).add_((queries @ self.centre)[:, None])


def block_size(queries: int, keys: int) -> int:
    """Keys worth scoring at once.

    Few queries: as many as stay in the cache between their conversion to float32 and the product, since memory traffic
    is all the cost. Many queries: large matrix products.
    """
    return _SMALL_BLOCK if queries * keys <= _SCORE_BUDGET else _KEY_BLOCK


def topk_blocks(
    queries: Tensor, blocks: Iterable[Block], k: int, removed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact neighbours of each query among keys that come in blocks.

    Args:
        queries: (Q, D) float32.
        blocks: In the order of their rows; scored in float32.
        k: Neighbours wanted.
        removed: (m,) bool: rows that do not count; those from m on do.

    Returns:
        Row numbers (Q, min(k, N)) int64, -1 where too few count, and scores float32, best first.
    """
    found: list[tuple[Tensor, Tensor]] = []
    waiting: list[Tensor] = []
    first = columns = 0
    for block in blocks if queries.shape[0] and k else ():
        size = block.keys.shape[0]
        if queries.shape[0] * (columns + size) > _SCORE_BUDGET and waiting:
            found.append(_best(torch.cat(waiting, 1), first, k, removed))
            waiting, columns = [], 0
        if not waiting:
            first = block.start
        if queries.shape[0] * size <= _SCORE_BUDGET:
            waiting.append(block.scores(queries))
            columns += size
            continue
        ready = block if block.scales is not None else Block(block.start, block.keys.float())
        step = max(1, _SCORE_BUDGET // size)
        parts = [
            _best(ready.scores(queries[row : row + step]), block.start, k, removed)
            for row in range(0, queries.shape[0], step)
        ]
        found.append((torch.cat([rows for rows, _ in parts]), torch.cat([values for _, values in parts])))
    if waiting:
        found.append(_best(waiting[0] if len(waiting) == 1 else torch.cat(waiting, 1), first, k, removed))
    if not found:
        empty = queries.new_zeros(queries.shape[0], 0)
        return empty.long(), empty
    rows, values = found[0]
    if len(found) > 1:
        rows, values = best_of(torch.cat([part[0] for part in found], 1), torch.cat([part[1] for part in found], 1), k)
    return (rows if removed is None else rows.masked_fill(values == float("-inf"), -1)), values


def _best(scores: Tensor, start: int, k: int, removed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows and scores of the k best of scores (Q, n) of rows from ``start`` on."""
    if removed is not None:
        out = removed[start : start + scores.shape[1]].nonzero()[:, 0].to(scores.device)
        if len(out):
            scores = scores.index_fill_(1, out, float("-inf"))
    values, columns = topk_columns(scores, min(k, scores.shape[1]))
    return columns + start, values


def rescore(queries: Tensor, keys: Tensor | Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Exact scores of candidate rows.

    Args:
        queries: (Q, D) float32.
        keys: (N, D), any floating dtype; or a function that gives keys (q, C, D) for rows (q, C).
        rows: (Q, C) int64; -1 where there is none.

    Returns:
        (Q, C) float32, -inf where the row is -1.
    """
    if rows.numel() == 0:
        return queries.new_zeros(rows.shape)
    step = max(1, _SCORE_BUDGET // (rows.shape[1] * queries.shape[1]))
    scores = []
    for first in range(0, rows.shape[0], step):
        part = rows[first : first + step].clamp_min(0)
        if isinstance(keys, Tensor):
            gathered = keys.index_select(0, part.flatten()).view(*part.shape, -1)
        else:
            gathered = keys(part)
        # This order of operands is several times faster on CPUs than keys @ query.
        scores.append((queries[first : first + step].unsqueeze(1) @ gathered.float().transpose(1, 2)).squeeze(1))
    return torch.cat(scores).masked_fill_(rows < 0, float("-inf"))


def best_of(rows: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best candidates of each query, best first.

    Args:
        rows: (Q, C) int64, without duplicates but for -1.
        scores: (Q, C) float32, -inf where the row is -1.
        k: At most C are returned.

    Returns:
        Rows and scores, each (Q, min(k, C)).
    """
    values, picked = scores.topk(min(k, scores.shape[1]), dim=1)
    return rows.gather(1, picked), values


def pad_rows(rows: Tensor, k: int) -> Tensor:
    """Exactly k columns: missing ones are -1."""
    missing = k - rows.shape[1]
    return rows[:, :k] if missing <= 0 else torch.nn.functional.pad(rows, (0, missing), value=-1)
