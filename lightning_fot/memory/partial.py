"""Attention over one part of the keys, with what is needed to join parts: log-sum-exps forward, gradients backward.

The softmax over a union of parts is a weighted mean of the parts' softmaxes, the weights being those of their
log-sum-exps:

    out = (e^l1 · out1 + e^l2 · out2) / (e^l1 + e^l2),    lse = log(e^l1 + e^l2)

Backward, a part needs nothing of the others but the joined ``out`` and ``lse``: its weights are e^(score - lse), and
the softmax's own term is the sum of ``grad · out``. So the fused kernels, given those in place of their own, return
exactly the part's share of the gradients (as in ring attention). Scores are never kept.

Pure functions of tensors. N rows, H heads of queries and of keys, T queries, S keys, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FUSED_CPU = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FUSED_CUDA = (torch.bfloat16, torch.float16)
# Kernels that leave their log-sum-exp are not in torch's documented interface, which hides it.
_aten: Any = torch.ops.aten


def fused(query: Tensor, value: Tensor) -> bool:
    """Whether a fused kernel serves these queries and values: no scores are held, whatever the number of keys."""
    dim = query.shape[-1]
    if value.shape[-1] != dim:
        return False
    if query.device.type == "cpu":
        return query.dtype in _FUSED_CPU
    return query.device.type == "cuda" and query.dtype in _FUSED_CUDA and dim % 8 == 0 and dim <= 256


def in_one_dtype(query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All in the dtype of ``query``, or autocast's inside of it, which does not cast for functions of our own."""
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    return tuple(tensor.to(dtype) for tensor in (query, *others))


def dense(tensor: Tensor) -> Tensor:
    """Kernels want the coordinates of a vector side by side; gradients of a sum, for one, are not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def zeros_for_sum(tensor: Tensor) -> Tensor:
    """Where shares of a gradient are added up, in fp32 at least, laid out as the tensor."""
    return torch.zeros_like(tensor, dtype=tensor.dtype if tensor.dtype == torch.float64 else torch.float32)


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over some keys.

    All tensors, here and in :func:`part_gradients`, have one dtype, and coordinates side by side in memory.

    Args:
        query: (N, H, T, D).
        key: (N, H, S, D).
        value: (N, H, S, D).
        scale: Factor on inner products.
        causal: Query t sees keys 0 to t only; needs S = T.
        mask: (N or 1, H or 1, T, S), added to scores, in the dtype of ``query``; each query sees a key.

    Returns:
        Output (N, H, T, D), and the log-sum-exp of each query's scores (N, H, T), fp32 (fp64 for fp64).
    """
    on_cpu = query.device.type == "cpu"
    if fused(query, value) and (on_cpu or mask is None):
        if on_cpu:
            out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, causal, attn_mask=mask, scale=scale
            )
        else:
            out, lse = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[:2]
        return out, lse
    scores = _scores(query, key, scale, causal)
    scores = scores if mask is None else scores + mask
    lse = scores.logsumexp(-1)
    return torch.matmul((scores - lse[..., None]).exp_().to(value.dtype), value), lse


def part_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The share of some keys in the gradients.

    Args:
        grad: (N, H, T, D), of the joined output.
        query: (N, H, T, D).
        key: (N, H, S, D).
        value: (N, H, S, D).
        out: (N, H, T, D), joined over all keys.
        lse: (N, H, T), joined over all keys.
        scale: Factor on inner products.
        causal: As it was forward.

    Returns:
        What these keys add to the queries' gradient, and the gradients of these keys and values.
    """
    if fused(query, value):
        if query.device.type == "cpu":
            found = _cpu_gradients(grad, query, key, value, out, lse, scale, causal)
        else:
            found = _cuda_gradients(grad, query, key, value, out, lse, scale, causal)
        return found[0], found[1], found[2]
    weights = (_scores(query, key, scale, causal) - lse[..., None]).exp_()
    grad = grad.to(weights.dtype)
    grad_scores = torch.matmul(grad, value.to(weights.dtype).mT)
    grad_scores.sub_((grad * out).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
    return (
        torch.matmul(grad_scores, key.to(weights.dtype)).to(query.dtype),
        torch.matmul(grad_scores.mT, query.to(weights.dtype)).to(key.dtype),
        torch.matmul(weights.mT, grad).to(value.dtype),
    )


def _cpu_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> Any:
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    rows, heads, keys = key.shape[:3]
    pieces = 1 if causal or rows > 1 else _pieces(heads, keys)
    if pieces == 1:
        return backward(grad, query, key, value, out, lse, 0.0, causal, scale=scale)
    # (1, H, P·S', D) → (P, H, S', D), each piece with the same queries: views, all of them.
    parts = (tensor[0].reshape(heads, pieces, keys // pieces, -1).transpose(0, 1) for tensor in (key, value))
    same = (tensor.expand(pieces, *tensor.shape[1:]) for tensor in (grad, query, out, lse))
    grad, query, out, lse = same
    grad_query, *grads = backward(grad, query, *parts, out, lse, 0.0, False, scale=scale)
    return grad_query.sum(0, keepdim=True), *(part.transpose(0, 1).flatten(1, 2)[None] for part in grads)


def _pieces(heads: int, keys: int) -> int:
    """Pieces of the keys that give every thread as much to do: the kernel's smallest task is a row and head.

    On 2 threads, 3 heads in one piece leave a quarter of the time idle; in two pieces they take 0.77 times as long.
    """
    threads = torch.get_num_threads()
    for pieces in range(1, threads + 1):
        tasks = heads * pieces
        if keys % pieces == 0 and tasks >= 0.9 * threads * -(-tasks // threads):
            return pieces
    return 1


def _cuda_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> Any:
    # Only dropout reads the state of the random numbers.
    state, offset = (torch.empty(size, dtype=torch.uint64, device=query.device) for size in (2, 0))
    return _aten._scaled_dot_product_flash_attention_backward(
        grad,
        query,
        key,
        value,
        out,
        lse.contiguous(),  # The kernel takes its layout for granted.
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        causal,
        state,
        offset,
        scale=scale,
    )


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    """(N, H, T, S), in fp32 at least."""
    scores = torch.matmul(query, key.mT)
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * scale
    if causal:
        length = query.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores.masked_fill_(hidden, -torch.inf)
    return scores


def join(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Adds a part in place, as if its keys had been in the same softmax.

    Args:
        out: (..., T, D), changed.
        lse: (..., T), changed.
        other_out: (..., T, D).
        other_lse: (..., T).
    """
    joined = torch.logaddexp(lse, other_lse)
    out.mul_((lse - joined).exp_()[..., None])
    out.add_(other_out * (other_lse - joined).exp_()[..., None])
    lse.copy_(joined)
