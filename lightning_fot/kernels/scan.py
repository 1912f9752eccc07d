"""Exact search: scores that never leave the chip, the largest of each few keys kept, then top-k of those.

The k largest of all scores lie in the k groups with the largest maxima. Keys are read once, as they are stored: in
float32, in half precision, or in eight bits with a scale a key.
"""

# Not postponed: Triton reads annotations of kernels as they are.
import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 8  # neighbouring keys of which the largest score is kept
_QUERIES, _KEYS = 16, 64


@triton.jit
def _group_tops(
    queries, keys, scales, removed, tops, count, size, known, groups, stride,
    DIM: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Of Q queries and N keys: the largest score of each G keys."""
    asked = tl.program_id(1) * Q + tl.arange(0, Q)
    rows = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    at = tl.arange(0, WIDE)
    inside = at < DIM
    left = tl.load(
        queries + asked[:, None] * DIM + at[None, :], mask=(asked < count)[:, None] & inside[None, :], other=0
    )
    there = rows < size
    right = tl.load(keys + rows[None, :] * stride + at[:, None], mask=there[None, :] & inside[:, None], other=0)
    # Cast first: a product of half precision would be rounded on the way, and in Triton's interpreter it is wrong.
    scores = tl.dot(left, right.to(tl.float32), input_precision="ieee")
    if SCALED:
        scores = scores * tl.load(scales + rows, mask=there, other=0).to(tl.float32)[None, :]
    gone = tl.load(removed + rows, mask=rows < known, other=0) != 0
    scores = tl.where((there & (gone == 0))[None, :], scores, float("-inf"))
    largest = tl.max(tl.reshape(scores, (Q, N // G, G)), axis=2)
    group = tl.program_id(0) * (N // G) + tl.arange(0, N // G)
    place = tops + asked[:, None].to(tl.int64) * groups + group[None, :]
    tl.store(place, largest, mask=(asked < count)[:, None] & (group < groups)[None, :])


def group_tops(queries: Tensor, keys: Tensor, scales: Tensor | None, removed: Tensor | None) -> Tensor:
    """The largest score of each ``GROUP`` neighbouring keys.

    Args:
        queries: (Q, D) float32, contiguous.
        keys: (n, D) floating or int8, rows possibly apart, coordinates side by side.
        scales: (n,) float16: what scores of int8 keys are multiplied with; None for floating keys.
        removed: (m,) bool, contiguous: keys that count as -inf; those from m on are there. None where all are.

    Returns:
        (Q, ceil(n / GROUP)) float32.
    """
    count, dim = queries.shape
    size, known = len(keys), 0 if removed is None else min(len(removed), len(keys))
    groups = triton.cdiv(size, GROUP)
    tops = queries.new_empty(count, groups)
    flags = torch.zeros(1, dtype=torch.uint8, device=keys.device) if removed is None else removed.view(torch.uint8)
    _group_tops[(triton.cdiv(size, _KEYS), triton.cdiv(count, _QUERIES))](
        queries, keys, queries if scales is None else scales, flags, tops, count, size, known, groups, keys.stride(0),
        DIM=dim, WIDE=max(16, triton.next_power_of_2(dim)), SCALED=scales is not None, Q=_QUERIES, N=_KEYS, G=GROUP,
    )  # fmt: skip
    return tops


def topk(
    queries: Tensor, keys: Tensor, k: int, scales: Tensor | None = None, removed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact neighbours by inner product. Nothing is copied to the host, and nothing waits for the device.

    Args:
        queries: (Q, D) float32, contiguous.
        keys: (n, D) floating or int8.
        k: Neighbours wanted, at most n.
        scales: (n,) float16 of int8 keys.
        removed: (m,) bool: keys that do not count.

    Returns:
        Rows (Q, k) int64, -1 where too few count, and scores (Q, k) float32, best first.
    """
    size, count = len(keys), len(queries)
    tops = group_tops(queries, keys, scales, removed)
    groups = tops.topk(min(k, tops.shape[1]), dim=1, sorted=False).indices
    each = torch.arange(GROUP, device=keys.device)
    rows = (groups[..., None] * GROUP + each).flatten(1)
    past = rows >= size
    rows = rows.clamp_max(size - 1)
    picked = keys.index_select(0, rows.flatten()).view(count, rows.shape[1], -1).float()
    scores = (queries[:, None] @ picked.transpose(1, 2))[:, 0]
    if scales is not None:
        scores = scores * scales[rows].float()
    if removed is not None and len(removed):
        past = past | ((rows < len(removed)) & removed[rows.clamp_max(len(removed) - 1)])
    values, best = scores.masked_fill_(past, float("-inf")).topk(k, dim=1)
    return rows.gather(1, best).masked_fill_(values == float("-inf"), -1), values
