"""One softmax over local and outside (key, value) pairs: the formula of the Focused Transformer (paper section 3.1).

    out(q) = sum over (k, v) in A ∪ C≤q of softmax(<q, k> · scale) · v

``C`` is the causal local context, ``A`` the pairs from outside: retrieved ones, a whole memory, or windows shown by
crossbatch. Pure functions of tensors. B rows, H query heads, G KV heads, R = H/G, T queries, S local keys, K retrieved
pairs, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_fot.memory.found import Attended, Found, Retrieved, Shown
from lightning_fot.model.attention.whole import attend_all, causal_mask, serves

# Scores held at once. Bounds what a dense read of a large memory takes: 2**26 fp32 scores are 256 MiB.
MAX_SCORES = 2**26


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outside: Found | None = None,
    *,
    scale: float,
    far_query: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    gate: Tensor | None = None,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
    max_scores: int = MAX_SCORES,
    on_weights: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Attention over local and outside pairs in one softmax.

    Args:
        query: (B, H, T, D), rotated as the local context is.
        key: (B, G, S, D), local, rotated.
        value: (B, G, S, D).
        outside: Pairs beyond the local context, or None.
        scale: Factor on inner products.
        far_query: (B, H, T, D), the queries as they ask outside pairs; None asks with ``query``.
        mask: (B or 1, H or 1, T, S), bool (True = seen) or additive; None means causal, the last query at the last key.
        softcap: ``c`` of ``c · tanh(score / c)`` (Gemma 2), or None.
        gate: (H,) logits; given, the two attentions are normalised apart and mixed by sigmoid(gate) (Memorizing
            Transformers, arXiv 2203.08913, section 3.2) instead of sharing one softmax.
        dropout: Share of weights set to 0, the others raised to make up for it (training alone).
        sinks: (H,) scores of one more column, without a value, that takes its share of each softmax of local pairs
            (gpt-oss); None has none.
        max_scores: Scores held at once; queries are cut in chunks to stay below. Changes no result beyond rounding.
        on_weights: Called once, where there are outside pairs, with their weights (B, G, R·T, K or M) as they enter the
            output: what is left to 1 is local.

    Returns:
        (B, H, T, D) in the dtype of ``query``.
    """
    batch, heads, length, _ = query.shape
    if outside is None and gate is None and softcap is None and sinks is None:
        return _local(query, key, value, scale, mask, dropout)
    far_query = query if far_query is None else far_query
    plain = gate is None and softcap is None and sinks is None and dropout == 0 and on_weights is None
    if plain and isinstance(outside, Shown) and serves(query, far_query, key, value, outside):
        return attend_all(query, far_query, key, value, outside, scale, mask)
    groups = key.shape[1]
    repeats = heads // groups
    full_mask = _additive(mask, query, key)
    columns = key.shape[2] + (0 if outside is None else outside.columns)
    step = max(1, min(length, max_scores // max(1, batch * heads * columns)))
    chunks, weights = [], []
    for start in range(0, length, step):
        stop = min(start + step, length)
        part = query[:, :, start:stop].reshape(batch, groups, repeats, stop - start, -1)
        local = torch.einsum("bgrtd,bgsd->bgrts", part, key) * scale
        local = _cap(local, softcap) + _group(full_mask[:, :, start:stop], groups)
        pairs = _slice(outside, repeats, start, stop)
        far_part = far_query[:, :, start:stop].reshape(part.shape)
        far = None if pairs is None else _far_scores(far_part, pairs, scale, softcap)
        mixed, far_weights = _combine(local, value, far, pairs, gate, dropout, sinks)
        chunks.append(mixed)
        if on_weights is not None and far_weights is not None:
            weights.append(far_weights.detach())
    if on_weights is not None and weights:
        on_weights(torch.cat(weights, dim=3).flatten(2, 3))
    return torch.cat(chunks, dim=2).to(query.dtype)


def _local(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, dropout: float) -> Tensor:
    # A single query is the last: it sees every key.
    causal = mask is None and query.shape[2] > 1
    if causal and query.shape[2] != key.shape[2]:
        mask, causal = causal_mask(query.shape[2], key.shape[2], query.device), False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """The mask as (B or 1, H or 1, T, S) numbers to add, in fp32."""
    if mask is None and query.shape[2] == 1:
        # A single query is the last: it sees every key. Decoding asks this of each text and layer.
        return torch.zeros(1, 1, 1, key.shape[2], dtype=torch.float32, device=query.device)
    if mask is None:
        mask = causal_mask(query.shape[2], key.shape[2], query.device)[None, None]
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return zeros.masked_fill_(~mask, torch.finfo(torch.float32).min)
    return mask.float()[..., : key.shape[2]]


def _group(mask: Tensor, groups: int) -> Tensor:
    """(B, H or 1, t, S) → (B, G or 1, R or 1, t, S)."""
    if mask.shape[1] == 1:
        return mask[:, :, None]
    return mask.reshape(mask.shape[0], groups, -1, *mask.shape[2:])


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    # Scores leave in fp32 (fp64 stays): a softmax in half precision would lose what retrieval is measured by.
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _slice(outside: Found | None, repeats: int, start: int, stop: int) -> Found | None:
    """The pairs of queries ``start`` to ``stop``; retrieved ones as (B, G, R, t, K, D)."""
    if outside is None or isinstance(outside, Shown):
        return outside

    def cut(tensor: Tensor) -> Tensor:
        batch, groups, rows = tensor.shape[:3]
        return tensor.reshape(batch, groups, repeats, rows // repeats, *tensor.shape[3:])[:, :, :, start:stop]

    if isinstance(outside, Attended):
        scores = None if outside.scores is None else cut(outside.scores)
        return Attended(cut(outside.out), cut(outside.lse), scores=scores)
    return Retrieved(cut(outside.keys), cut(outside.values), cut(outside.valid))


def _far_scores(part: Tensor, pairs: Found, scale: float, softcap: float | None) -> Tensor:
    """Scores (B, G, R, t, K or M) of queries (B, G, R, t, D); the lowest number where a pair is not there.

    Attention that was computed elsewhere is one pair, (B, G, R, t, 1).
    """
    if isinstance(pairs, Attended):
        return pairs.lse[..., None].clamp_min(torch.finfo(torch.float32).min)
    if isinstance(pairs, Shown):
        scores = _cap(torch.einsum("bgrtd,bgmd->bgrtm", part, pairs.keys.to(part.dtype)) * scale, softcap)
        if pairs.valid is None:
            return scores
        hidden = ~pairs.valid[:, None, None, None, :]
    else:
        found = torch.matmul(pairs.keys.to(part.dtype), part[..., None])[..., 0]
        scores = _cap(found * scale, softcap)
        hidden = ~pairs.valid
    return scores.masked_fill(hidden, torch.finfo(torch.float32).min)


def _combine(
    local: Tensor,
    value: Tensor,
    far: Tensor | None,
    pairs: Found | None,
    gate: Tensor | None,
    dropout: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Weights from scores, then the values' sum (B, H, t, D), and the outside pairs' weights (B, G, R, t, K or M)."""
    batch, groups, repeats, length, local_keys = local.shape

    def softmax(scores: Tensor) -> Tensor:
        if sinks is None:
            return scores.softmax(-1)
        column = sinks.reshape(1, groups, repeats, 1, 1).to(scores).expand(batch, -1, -1, length, -1)
        return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]

    if far is None or pairs is None:
        far_weights = None
        mixed = _sum(F.dropout(softmax(local), dropout), value, None)
    elif gate is None:
        # Equation of fot-semantics section 1: one softmax over the union.
        weights = F.dropout(softmax(torch.cat([local, far], dim=-1)), dropout)
        far_weights = weights[..., local_keys:]
        mixed = _sum(weights[..., :local_keys], value, None) + _far_sum(far_weights, pairs)
    else:
        far_weights = far.softmax(-1)
        share = gate.sigmoid().reshape(1, groups, repeats, 1, 1).to(local.dtype)
        valid = _there(pairs)
        if valid is not None:
            far_weights = far_weights * valid
            # A row without a memory attends locally alone, as it would in a batch of its own.
            share = share * valid.any(-1, keepdim=True)
        far_weights = F.dropout(share * far_weights, dropout)
        local_weights = F.dropout((1 - share) * softmax(local), dropout)
        mixed = _far_sum(far_weights, pairs) + _sum(local_weights, value, None)
    mixed = mixed.reshape(batch, groups * repeats, length, -1)
    if isinstance(pairs, Attended) and pairs.scores is not None and far_weights is not None:
        # What the one pair got, shared out among those that it stands for.
        far_weights = far_weights * (pairs.scores - pairs.lse[..., None]).exp().nan_to_num()
    return mixed, far_weights


def _there(pairs: Found) -> Tensor | None:
    """Which pairs are there, for weights (B, G, R, t, K or M); None where all are."""
    if isinstance(pairs, Attended):
        return pairs.lse[..., None] > -torch.inf
    if isinstance(pairs, Retrieved) or pairs.valid is None:
        return pairs.valid
    return pairs.valid[:, None, None, None, :]


def _far_sum(weights: Tensor, pairs: Found) -> Tensor:
    if isinstance(pairs, Attended):
        return weights * pairs.out.to(weights.dtype)
    return _sum(weights, pairs.values, pairs)


def _sum(weights: Tensor, values: Tensor, pairs: Retrieved | Shown | None) -> Tensor:
    values = values.to(weights.dtype)
    if isinstance(pairs, Retrieved):
        return torch.matmul(weights[..., None, :], values)[..., 0, :]
    return torch.einsum("bgrts,bgsd->bgrtd", weights, values)
