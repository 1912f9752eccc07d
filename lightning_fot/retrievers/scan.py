"""Exact top-k by inner product, in blocks, and exact rescoring of candidates: pure functions on torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_GROUP = 32
_KEY_BLOCK = 65536
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
    n, k = keys.shape[0], min(k, keys.shape[0])
    if k == 0 or queries.shape[0] == 0:
        empty = queries.new_zeros(queries.shape[0], k)
        return empty.long(), empty
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, n, _KEY_BLOCK):
        block = keys[start : start + _KEY_BLOCK].float()
        step = max(1, _SCORE_BUDGET // block.shape[0])
        parts = [
            topk_columns(queries[first : first + step] @ block.T, min(k, block.shape[0]))
            for first in range(0, queries.shape[0], step)
        ]
        found.append((torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]) + start))
    if len(found) == 1:
        return found[0][1], found[0][0]
    return best_of(torch.cat([rows for _, rows in found], dim=1), torch.cat([values for values, _ in found], dim=1), k)


def rescore(queries: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """Exact scores of candidate rows.

    Args:
        queries: (Q, D) float32.
        keys: (N, D), any floating dtype.
        rows: (Q, C) int64; -1 where there is none.

    Returns:
        (Q, C) float32, -inf where the row is -1.
    """
    if rows.numel() == 0:
        return queries.new_zeros(rows.shape)
    step = max(1, _SCORE_BUDGET // (rows.shape[1] * keys.shape[1]))
    scores = []
    for first in range(0, rows.shape[0], step):
        part = rows[first : first + step]
        gathered = keys.index_select(0, part.clamp_min(0).flatten()).float().view(*part.shape, -1)
        # This order of operands is several times faster on CPUs than keys @ query.
        scores.append((queries[first : first + step].unsqueeze(1) @ gathered.transpose(1, 2)).squeeze(1))
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
