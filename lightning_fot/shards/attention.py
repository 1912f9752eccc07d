"""Attention over one shard's pairs, and how the parts of several are joined.

The result is attention over the ``k`` best pairs of all shards, wherever they lie. Each shard gives the scores of its
own ``k`` best; of their union the ``k`` best win; each shard attends to its winners; parts are joined by their
log-sum-exps (see ``memory/partial.py``). A shard's winners are the first of its own list, so a number names them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fot.memory.partial import attend_part, dense, join

# Scores held at once.
_MAX_SCORES = 2**24

Part = tuple[Tensor, Tensor]


def capped(scores: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scores as the softmax takes them, of inner products."""
    scores = scores * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def attend_scored(scores: Tensor, values: Tensor) -> Part:
    """Attention to pairs whose scores are known.

    Args:
        scores: (B, G, Q, K) fp32, -inf where there is no pair.
        values: (B, G, Q, K, D).

    Returns:
        (B, G, Q, D) fp32, 0 where there are no pairs, and log-sum-exps (B, G, Q), -inf there.
    """
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num()
    return torch.matmul(weights[..., None, :], values.float())[..., 0, :], lse


def attend_shown(
    queries: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int], scale: float, softcap: float | None
) -> Part:
    """Attention to all pairs of each row.

    Args:
        queries: (B, G, Q, D) fp32.
        keys: (B, G, M, D).
        values: (B, G, M, D).
        lengths: Pairs of each row.
        scale: Factor on inner products.
        softcap: As :class:`~lightning_fot.memory.found.Scoring`.

    Returns:
        As :func:`attend_scored`.
    """
    outs, lses = [], []
    for row, length in enumerate(lengths):
        asked = queries[row : row + 1]
        if not length:
            outs.append(asked.new_zeros(*asked.shape[:3], values.shape[-1]))
            lses.append(asked.new_full(asked.shape[:3], -torch.inf))
            continue
        own_keys, own_values = (dense(part[row : row + 1, :, :length].float()) for part in (keys, values))
        out, lse = (
            attend_part(dense(asked), own_keys, own_values, scale)
            if softcap is None
            else _attend_capped(asked, own_keys, own_values, scale, softcap)
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _attend_capped(queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float) -> Part:
    step = max(1, _MAX_SCORES // (keys.shape[1] * keys.shape[2]))
    parts = []
    for start in range(0, queries.shape[2], step):
        scores = capped(torch.matmul(queries[:, :, start : start + step], keys.mT), scale, softcap)
        lse = scores.logsumexp(-1)
        parts.append((torch.matmul((scores - lse[..., None]).exp_(), values), lse))
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def joined(parts: Sequence[Part]) -> Part:
    """Parts as one softmax over the pairs of all."""
    # Kernels give a layout of their own, which is written to here.
    out, lse = parts[0][0].clone(), parts[0][1].clone()
    for other_out, other_lse in parts[1:]:
        none = (lse == -torch.inf) & (other_lse == -torch.inf)
        join(out, lse, other_out, other_lse)
        if bool(none.any()):
            out.masked_fill_(none[..., None], 0.0)
            lse.masked_fill_(none, -torch.inf)
    return out, lse


def winners(scores: Sequence[Tensor], k: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """The best of all shards' best.

    Args:
        scores: Of each shard (B, G, Q, K_s), the largest first, -inf where there is none.
        k: Pairs wanted in all.

    Returns:
        For each shard how many of its first win, (B, G, Q) int64; the winners' scores (B, G, Q, K) with K at most
        ``k``, -inf where there are fewer; and their places in the shards' scores side by side.
    """
    union = torch.cat(list(scores), dim=-1)
    best, places = union.topk(min(k, union.shape[-1]), dim=-1)
    ends = torch.tensor([part.shape[-1] for part in scores], device=union.device).cumsum(0)
    owner = torch.searchsorted(ends, places, right=True).masked_fill(best == -torch.inf, -1)
    return [(owner == shard).sum(-1) for shard in range(len(scores))], best, places
