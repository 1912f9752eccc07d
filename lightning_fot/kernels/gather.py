"""Attention over retrieved pairs, read where they lie: no copies of keys and values are made beside the memory.

Its output comes with the logarithm of its softmax's denominator, so that it can be merged with attention over other
pairs, computed by whatever is fastest for those.
"""

# Not postponed: Triton reads annotations of kernels as they are.
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _attend_rows(
    queries, keys, values, rows, out, sums, scale, asked, key_bank, key_row, value_bank, value_row,
    DIM: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One query: its pairs STEP at a time, with a running largest score and sum."""
    query, bank = tl.program_id(0), tl.program_id(1).to(tl.int64)
    line = bank * asked + query
    at = tl.arange(0, WIDE)
    inside = at < DIM
    vector = tl.load(queries + line * DIM + at, mask=inside, other=0).to(tl.float32)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    mixed = tl.zeros((WIDE,), tl.float32)
    for start in range(0, K, STEP):
        slot = start + tl.arange(0, STEP)
        row = tl.load(rows + line * K + slot, mask=slot < K, other=-1)
        there = row >= 0
        row = tl.where(there, row, 0)
        pick = there[:, None] & inside[None, :]
        key = tl.load(keys + bank * key_bank + row[:, None] * key_row + at[None, :], mask=pick, other=0).to(tl.float32)
        scores = tl.where(there, tl.sum(key * vector[None, :], axis=1) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=0))
        # Nothing found so far: no difference of infinities.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base)
        shrink = tl.exp(top - base)
        value = tl.load(values + bank * value_bank + row[:, None] * value_row + at[None, :], mask=pick, other=0)
        mixed = mixed * shrink + tl.sum(weights[:, None] * value.to(tl.float32), axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        top = higher
    safe = tl.where(total > 0, total, 1.0)
    tl.store(out + line * DIM + at, mixed / safe, mask=inside)
    tl.store(sums + line + tl.arange(0, 1), tl.where(total > 0, top + tl.log(safe), float("-inf")))


def attend_rows(queries: Tensor, keys: Tensor, values: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each query over the pairs found for it.

    Args:
        queries: (banks, T, D) floating; the query heads of a group are folded into T.
        keys: (banks, n, D) floating, coordinates side by side.
        values: (banks, n, D), the same.
        rows: (banks, T, K) int64, -1 where there is none.
        scale: Factor on inner products.

    Returns:
        (banks, T, D) float32, zero where a query has no pair; and the logarithm of the sum of exp of its scores
        (banks, T) float32, -inf there.
    """
    banks, asked, dim = queries.shape
    found = rows.shape[2]
    out = torch.empty(banks, asked, dim, dtype=torch.float32, device=queries.device)
    sums = torch.empty(banks, asked, dtype=torch.float32, device=queries.device)
    _attend_rows[(asked, banks)](
        queries.contiguous(), keys, values, rows.contiguous(), out, sums, scale, asked,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        DIM=dim, WIDE=triton.next_power_of_2(dim), K=found, STEP=min(32, triton.next_power_of_2(max(1, found))),
    )  # fmt: skip
    return out, sums


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of pairs, from that over each.

    Args:
        one: Outputs (..., D) float32 and logarithms of sums (...).
        other: The same of other pairs.

    Returns:
        The same of all: zero and -inf where neither has a pair.
    """
    sums = torch.logaddexp(one[1], other[1])
    base = sums.nan_to_num(neginf=0.0)
    share = (one[1] - base).exp()[..., None], (other[1] - base).exp()[..., None]
    return share[0] * one[0] + share[1] * other[0], sums
