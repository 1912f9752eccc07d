"""Rectified positions (ReRoPE, https://kexue.fm/archives/9708): distances beyond a limit count as the limit.

    score(i, j) = <R(min(i - j, w)) q_i, k_j>,    R(n) the backbone's rotation by n positions

so that no distance is one that the backbone has not been trained on. A pair is scored in one of two ways: nearer than
``w`` both sides are rotated to their own places; from there on the query is rotated to place ``w`` and the key to
place 0. B rows, H query heads, G KV heads, R = H/G, L queries that are the last of S keys, D head size.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_fot.attention import MAX_SCORES, attend
from lightning_fot.errors import SettingError
from lightning_fot.passes import LayerCall, Pass
from lightning_fot.positions import rotate


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


class RectifiedPass(Pass):
    """Every layer attends with rectified positions; keys of earlier calls may come from a KV cache, not rotated.

    Args:
        length: Tokens of the whole text, those of earlier and later calls included.
        max_distance: From this distance on all are the same.
        device: Of the model.
    """

    serves_all_layers: ClassVar[bool] = True
    unrotated: ClassVar[bool] = True
    replayable: ClassVar[bool] = True

    def __init__(self, length: int, max_distance: int, device: torch.device) -> None:
        self.max_distance = max_distance
        self.positions = torch.arange(max(length, max_distance + 1), device=device)[None]

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Attention of any layer over all tokens so far."""
        if call.sliding_window is not None:
            raise SettingError(
                "model.memory.max_distance",
                self.max_distance,
                f"layer {call.layer_idx} of this backbone sees {call.sliding_window} tokens back and no further",
                "Use a backbone of full attention.",
            )
        width = key.shape[2]
        if call.rotary is None or call.position_embeddings is None:
            return attend(query, key, value, scale=scale, softcap=softcap, dropout=call.dropout)
        cos, sin = call.position_embeddings
        local_query, local_key = rotate(call.rotary, query, key, (cos[:, :width], sin[:, :width]))
        if width <= self.max_distance:
            return attend(local_query, local_key, value, scale=scale, softcap=softcap, dropout=call.dropout)
        place = slice(self.max_distance, self.max_distance + 1)
        limit = tuple(part[:, place].expand(-1, query.shape[2], -1) for part in (cos, sin))
        return rectified_attention(
            local_query,
            call.rotary(query, query[:, :1], *limit)[0],
            local_key,
            call.to_position_zero(key),
            value,
            self.max_distance,
            scale=scale,
            softcap=softcap,
            dropout=call.dropout,
        )
