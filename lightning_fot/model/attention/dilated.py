"""LongNet's dilated attention (arXiv 2307.02486, sections 3.1 to 3.3), causal, over a text or its last tokens.

For each pair of a segment length w and a dilation r the text is cut in segments of w tokens; head j sees, within a
segment, the rows at j mod r, j mod r + r, j mod r + 2r, ... and only these rows are queries:

    O_i = sum over w, r of a_i(w, r) · softmax(Q K^T) V,    a_i(w, r) = s_i(w, r) / sum over w', r' of s_i(w', r')

with s_i the denominator of the softmax. That is one softmax over all pairs of all patterns, a pair counting as often as
patterns have it, so that patterns are joined by their log-sum-exps (see ``partial``). What
is kept for the backward pass is the input, the output and a number for each query and head.

Pure functions of tensors. N texts, H query heads, G KV heads, L queries that are the last of S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_fot.memory.partial import attend_part, dense, in_one_dtype, join, part_gradients, zeros_for_sum

# (segment length, dilation) of each pattern.
Patterns = Sequence[tuple[int, int]]


def first_needed(stop: int, patterns: Patterns) -> int:
    """Place of the first key that tokens from place ``stop`` on see: where the earliest segment in progress begins.

    Example:
        >>> first_needed(600, [(64, 1), (256, 4)]), first_needed(512, [(64, 1), (256, 4)])
        (512, 512)
    """
    return min(stop // size * size for size, _ in patterns)


def dilated_attention(
    query: Tensor, key: Tensor, value: Tensor, patterns: Patterns, *, scale: float, stop: int | None = None
) -> Tensor:
    """Causal dilated attention of the last L tokens of a text.

    Args:
        query: (N, H, L, D), rotated, of places ``stop - L`` to ``stop - 1`` of the text.
        key: (N, G, S, D), rotated, of the last S places; from :func:`first_needed` of ``stop - L`` on at least.
        value: (N, G, S, D).
        patterns: Segment lengths and dilations; one of them with dilation 1, so that every row is a query of a pattern.
        scale: Factor on inner products.
        stop: Tokens of the text so far; None means S.

    Returns:
        (N, H, L, D).
    """
    query, key, value = in_one_dtype(query, key, value)
    apply: Callable[..., Tensor] = _Dilated.apply
    return apply(query, key, value, tuple(patterns), scale, key.shape[2] if stop is None else stop)


class _Dilated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, patterns: Patterns, scale: float, stop: int
    ) -> Tensor:
        query, key, value = map(dense, (query, key, value))
        texts, heads, length, _ = query.shape
        out = query.new_zeros(texts, length, heads, value.shape[-1]).transpose(1, 2)
        precise = query.dtype if query.dtype == torch.float64 else torch.float32
        lse = query.new_full((texts, heads, length), -torch.inf, dtype=precise)
        for chosen, rows, seen, causal in _parts(query, key, patterns, stop):
            groups = _groups(query, key, chosen)
            part = key[:, :, seen][:, groups], value[:, :, seen][:, groups]
            found, found_lse = attend_part(query[:, chosen, rows], *part, scale, causal)
            join(out[:, chosen, rows], lse[:, chosen, rows], found, found_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.patterns, ctx.scale, ctx.stop = patterns, scale, stop
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad = dense(grad)
        grad_query, grad_key, grad_value = map(zeros_for_sum, (query, key, value))
        for chosen, rows, seen, causal in _parts(query, key, ctx.patterns, ctx.stop):
            groups = _groups(query, key, chosen)
            part_query, part_key, part_value = part_gradients(
                grad[:, chosen, rows],
                query[:, chosen, rows],
                key[:, :, seen][:, groups],
                value[:, :, seen][:, groups],
                out[:, chosen, rows],
                lse[:, chosen, rows],
                ctx.scale,
                causal,
            )
            grad_query[:, chosen, rows] += part_query
            # Heads of a group may see the same rows: their shares are added, not written.
            grad_key[:, :, seen].index_add_(1, groups, part_key.to(grad_key.dtype))
            grad_value[:, :, seen].index_add_(1, groups, part_value.to(grad_value.dtype))
        gradients = ((grad_query, query), (grad_key, key), (grad_value, value))
        return (*(found.to(tensor.dtype) for found, tensor in gradients), None, None, None)


def _parts(query: Tensor, key: Tensor, patterns: Patterns, stop: int) -> Iterator[tuple[slice, slice, slice, bool]]:
    """(query heads, queries, keys, causal) of every part: strided slices of the tensors, no masks."""
    heads, first_query, first_key = query.shape[1], stop - query.shape[2], stop - key.shape[2]
    for size, step in patterns:
        for offset in range(min(step, heads)):
            chosen = slice(offset, None, step)
            for begin in range(first_query // size * size, stop, size):
                # The segment's rows are at start, start + step, ...; those from `own` on are queries.
                start, end = begin + offset, min(begin + size, stop)
                own = start + max(0, -(-(first_query - start) // step)) * step
                if own >= end:
                    continue
                rows = slice(own - first_query, end - first_query, step)
                if own > start:
                    yield chosen, rows, slice(start - first_key, own - first_key, step), False
                yield chosen, rows, slice(own - first_key, end - first_key, step), True


def _groups(query: Tensor, key: Tensor, chosen: slice) -> Tensor:
    """KV head of each chosen query head, int64."""
    return torch.arange(query.shape[1], device=query.device)[chosen] // (query.shape[1] // key.shape[1])
