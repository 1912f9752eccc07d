"""Rows that attend to shared windows: one copy of the windows serves all rows, forward and backward.

Each row's softmax is put together from parts (see ``partial``): its causal local window,
and each run of neighbouring windows that it sees, which is a slice of the one copy. Rows of the ``packed`` layout see
one run, those of ``paper`` at most two unless windows are missing.

What is kept for the backward pass is the input, the output and a number for each query and head: scores are made again.
B rows, H query heads, G KV heads, R = H/G, T queries of a row, M tokens of all windows, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_fot.memory.partial import attend_part, dense, fused, join, part_gradients, zeros_for_sum
from lightning_fot.model.attention.softmax import MAX_SCORES

# For each row, (start, stop) places of tokens that it sees.
Runs = list[list[tuple[int, int]]]


def runs_of(seen: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Numbers of windows as (start, stop) places of their tokens, neighbours joined.

    Args:
        seen: Window numbers, in any order.
        size: Tokens of a window.

    Example:
        >>> runs_of([3, 0, 2], 10)
        [(0, 10), (20, 40)]
    """
    runs: list[tuple[int, int]] = []
    for number in sorted(seen):
        start, stop = number * size, (number + 1) * size
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, stop))
    return runs


def attend_shared(
    query: Tensor, key: Tensor, value: Tensor, far_key: Tensor, far_value: Tensor, runs: Runs, scale: float
) -> Tensor:
    """One softmax for each query over its causal local window and the runs of shared tokens that its row sees.

    Args:
        query: (B, H, T, D).
        key: (B, G, T, D), local.
        value: (B, G, T, D).
        far_key: (G, M, D), shared.
        far_value: (G, M, D).
        runs: What each of the B rows sees.
        scale: Factor on inner products.

    Returns:
        (B, H, T, D), laid out as (B, T, H, D).
    """
    apply: Callable[..., Tensor] = _SharedWindows.apply
    return apply(query, key, value, far_key, far_value, runs, scale)


class _SharedWindows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        far_key: Tensor,
        far_value: Tensor,
        runs: Runs,
        scale: float,
    ) -> Tensor:
        query, key, value, far_key, far_value = map(dense, (query, key, value, far_key, far_value))
        batch, heads, length, _ = query.shape
        groups = key.shape[1]
        # Callers want (B, T, H, D): in this layout their transposition copies nothing.
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        precise = query.dtype if query.dtype == torch.float64 else torch.float32
        lse = query.new_empty(batch, heads, length, dtype=precise)
        for rows, part in _local_parts(query, key, value):
            out[rows, part], lse[rows, part] = attend_part(
                query[rows, part], key[rows], value[rows], scale, causal=True
            )
        for row, start, stop in _far_parts(query, value, runs):
            folded = _fold(query[row], groups)
            found, found_lse = attend_part(folded, far_key[None, :, start:stop], far_value[None, :, start:stop], scale)
            join(out[row], lse[row], found.reshape(heads, length, -1), found_lse.reshape(heads, length))
        ctx.save_for_backward(query, key, value, far_key, far_value, out, lse)
        ctx.runs, ctx.scale = runs, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, far_key, far_value, out, lse = ctx.saved_tensors
        grad, scale = dense(grad), ctx.scale
        groups = key.shape[1]
        grad_query = torch.empty_like(query)
        grad_key, grad_value = zeros_for_sum(key), zeros_for_sum(value)
        grad_far_key, grad_far_value = (
            zeros_for_sum(tensor) if needed else None
            for tensor, needed in zip((far_key, far_value), ctx.needs_input_grad[3:5], strict=True)
        )
        for rows, part in _local_parts(query, key, value):
            grad_query[rows, part], local_key, local_value = part_gradients(
                grad[rows, part],
                query[rows, part],
                key[rows],
                value[rows],
                out[rows, part],
                lse[rows, part],
                scale,
                causal=True,
            )
            grad_key[rows] += local_key
            grad_value[rows] += local_value
        for row, start, stop in _far_parts(query, value, ctx.runs):
            part_query, part_key, part_value = part_gradients(
                _fold(grad[row], groups),
                _fold(query[row], groups),
                far_key[None, :, start:stop],
                far_value[None, :, start:stop],
                _fold(out[row], groups),
                lse[row].reshape(1, groups, -1),
                scale,
            )
            grad_query[row] += part_query.reshape(query[row].shape)
            if grad_far_key is not None:
                grad_far_key[:, start:stop] += part_key[0]
            if grad_far_value is not None:
                grad_far_value[:, start:stop] += part_value[0]
        return (
            grad_query,
            grad_key.to(key.dtype),
            grad_value.to(value.dtype),
            None if grad_far_key is None else grad_far_key.to(far_key.dtype),
            None if grad_far_value is None else grad_far_value.to(far_value.dtype),
            None,
            None,
        )


def _local_parts(query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows, and query heads of which each KV head serves one: no kernel then needs to know of grouped heads."""
    batch, heads, length, _ = query.shape
    groups = key.shape[1]
    repeats = heads // groups
    step = batch if fused(query, value) else max(1, MAX_SCORES // (groups * length * length))
    for start in range(0, batch, step):
        for repeat in range(repeats):
            # Heads r, r + R, r + 2R, ... belong to KV heads 0, 1, 2, ...
            yield slice(start, start + step), slice(repeat, None, repeats)


def _far_parts(query: Tensor, value: Tensor, runs: Runs) -> Iterator[tuple[int, int, int]]:
    """(row, start, stop) of every part; cut where scores are held, so that few are held at once."""
    _, heads, length, _ = query.shape
    for row, seen in enumerate(runs):
        for start, stop in seen:
            step = stop - start if fused(query, value) else max(1, MAX_SCORES // (heads * length))
            for place in range(start, stop, step):
                yield row, place, min(place + step, stop)


def _fold(tensor: Tensor, groups: int) -> Tensor:
    """(H, T, D) → (1, G, R·T, D): queries of a group side by side, served by one stream of keys."""
    heads, length, dim = tensor.shape
    return tensor.reshape(1, groups, heads // groups * length, dim)
