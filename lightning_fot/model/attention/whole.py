"""Attention over a local window and a whole memory by fused kernels: no search, no gathering, no scores held.

One softmax over both, put together from two parts by their log-sum-exps (see ``partial``):

    out(q) = sum over (k, v) in M ∪ C≤q of softmax(<q, k> · scale) · v

Queries may ask the two parts in different forms. No gradients. B rows, H query heads, G KV heads, R = H/G, T queries, S
local keys, M pairs of the memory, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_fot.memory.found import Shown
from lightning_fot.memory.partial import attend_part, dense, fused, join


def fold_heads(query: Tensor, kv_heads: int) -> Tensor:
    """(B, H, T, D) → (B, G, R·T, D): queries of a group side by side, so that one stream of keys serves them."""
    batch, heads, length, dim = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads * length, dim)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(T, S) bool: the last query sees all keys, the one before all but the last, and so on."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def serves(query: Tensor, far_query: Tensor, key: Tensor, value: Tensor, outside: Shown) -> bool:
    """Whether :func:`attend_all` can be asked: a kernel takes these tensors, and no gradient is wanted."""
    tensors = (query, far_query, key, value, outside.keys, outside.values)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return fused(query, value) and key.dtype == value.dtype == query.dtype


def attend_all(
    query: Tensor, far_query: Tensor, key: Tensor, value: Tensor, outside: Shown, scale: float, mask: Tensor | None
) -> Tensor:
    """Local and outside pairs in one softmax; what :func:`serves` has agreed to.

    Args:
        query: (B, H, T, D), as it asks the local window.
        far_query: (B, H, T, D), as it asks the memory.
        key: (B, G, S, D), local.
        value: (B, G, S, D).
        outside: The memory.
        scale: Factor on inner products.
        mask: (B or 1, H or 1, T, S), bool (True is seen) or added to scores; None is causal.

    Returns:
        (B, H, T, D).
    """
    groups = key.shape[1]
    out, lse = _local(query, key, value, scale, mask)
    # Joined in the precision of the log-sum-exps: a half would be rounded twice.
    out = out.to(lse.dtype)
    folded = fold_heads(far_query, groups)
    for rows, keys, values in _seen(outside):
        keys, values = dense(keys.to(query.dtype)), dense(values.to(query.dtype))
        join(out[rows], lse[rows], *attend_part(folded[rows], keys, values, scale))
    return out.reshape(query.shape).to(query.dtype)


def _seen(outside: Shown) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, and the keys and values (n, G, M, D) that they see: all rows at once where they see all."""
    if outside.valid is None or bool(outside.valid.all()):
        yield slice(None), outside.keys, outside.values
        return
    for row, seen in enumerate(outside.valid):
        if bool(seen.any()):
            part = slice(row, row + 1)
            yield part, outside.keys[part][:, :, seen], outside.values[part][:, :, seen]


def _local(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output (B, G, R·T, D) and log-sum-exps (B, G, R·T), fp32 at least, of the local window."""
    heads, length = query.shape[1:3]
    groups, width = key.shape[1], key.shape[2]
    folded, key, value = fold_heads(query, groups), dense(key), dense(value)
    if mask is None and length == 1:
        return attend_part(folded, key, value, scale)
    if mask is None:
        mask = causal_mask(length, width, query.device)[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, -torch.inf)
    # Rows of the folded queries are those of R heads, one after the other.
    mask = mask.to(query.dtype)[..., :width].expand(-1, heads, -1, -1).reshape(len(mask), groups, -1, width)
    return attend_part(folded, key, value, scale, mask=mask)
