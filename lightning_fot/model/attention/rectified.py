"""Rectified positions (ReRoPE, https://kexue.fm/archives/9708): distances beyond a limit count as the limit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_fot.model.attention.softmax import MAX_SCORES


def rectified_attention(
    query: Tensor,
    limit_query: Tensor,
    key: Tensor,
    zero_key: Tensor,
    value: Tensor,
    max_distance: int,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    max_scores: int = MAX_SCORES,
) -> Tensor:
    """Causal attention with distances clamped at ``max_distance``, in one softmax.

    Args:
        query: (B, H, L, D), rotated to its own places.
        limit_query: (B, H, L, D), rotated to place ``max_distance``.
        key: (B, G, S, D), rotated to its own places.
        zero_key: (B, G, S, D), as if at place 0.
        value: (B, G, S, D).
        max_distance: From this distance on all are the same.
        scale: Factor on inner products.
        softcap: ``c`` of ``c · tanh(score / c)``, or None.
        dropout: Share of weights set to 0.
        max_scores: Scores held at once; queries are cut in chunks to stay below. Changes no result beyond rounding.

    Returns:
        (B, H, L, D) in the dtype of ``query``.
    """
    batch, heads, length, dim = query.shape
    groups, width = key.shape[1], key.shape[2]
    step = max(1, min(length, max_scores // (batch * heads * width)))
    chunks = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        first, last = width - length + start, width - length + stop
        places = torch.arange(first, last, device=query.device)[:, None]
        # Only the chunk's own columns are scored both ways.
        near, far = slice(max(0, first - max_distance + 1), last), slice(0, max(0, last - max_distance))
        scores = []
        for queries, keys, seen in ((query, key, near), (limit_query, zero_key, far)):
            columns = torch.arange(seen.start, seen.stop, device=query.device)
            distance = places - columns
            visible = (distance >= max_distance) if seen is far else (distance >= 0) & (distance < max_distance)
            part = queries[:, :, start:stop].reshape(batch, groups, heads // groups, stop - start, dim)
            found = torch.einsum("bgrtd,bgsd->bgrts", part, keys[:, :, seen].to(part.dtype)) * scale
            found = found if found.dtype == torch.float64 else found.float()
            found = found if softcap is None else softcap * torch.tanh(found / softcap)
            scores.append(found.masked_fill(~visible, -torch.inf))
        weights = F.dropout(torch.cat(scores, dim=-1).softmax(-1), dropout)
        values = torch.cat([value[:, :, near], value[:, :, far]], dim=2).to(weights.dtype)
        chunks.append(torch.einsum("bgrts,bgsd->bgrtd", weights, values).flatten(1, 2))
    return torch.cat(chunks, dim=2).to(query.dtype)
