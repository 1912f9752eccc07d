"""Exact search for a few queries: products in eight bits, then float32 for the keys that could be among the best.

The result is exact, not likely so: every key that is not scored in float32 has a score that is proved to be too small.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fot.retrievers.keys import native
from lightning_fot.retrievers.keys.codes import GROUP, Coded, CodedQueries, Floats, largest, members

# At most this many rows for each one that is wanted are scored in float32 (of recorded keys 5, in the median): beyond
# that a scan of all is faster.
_MOST = 64
_LOWEST = -(2**31) + 1
# Products of 4 to 7 rows take three times as long as those of 8.
_SLOW = range(4, 8)

# Room for more products than this (32 MB) is not kept.
_MOST_KEPT = 1 << 23

Rows = NDArray[np.int64]


class _Kept(threading.local):
    """Room for products that each thread keeps from one call to the next.

    The operating system clears fresh memory page by page: for half a megabyte that takes a third as long as the search
    of a hundred thousand keys.
    """

    def __init__(self) -> None:
        self._kept = torch.empty(0, 0, dtype=torch.int32)

    def room(self, count: int, size: int) -> Tensor:
        """(count, size) int32 of arbitrary numbers, this thread's until it asks again."""
        if self._kept.shape == (count, size):
            return self._kept
        room = torch.empty(count, size, dtype=torch.int32)
        if count * size <= _MOST_KEPT:
            self._kept = room
        return room


_kept = _Kept()


def fits(rows: int, k: int) -> bool:
    """Whether so many coded rows are enough to leave some out."""
    return rows >= 4 * GROUP * k


@lru_cache(maxsize=8)
def products_are_exact(dim: int) -> bool:
    """Whether this machine multiplies eight bits, fast and without saturating on the way."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not (able.get("avx512_vnni") or able.get("avx_vnni")):
        return False
    extreme = torch.full((64, dim), 127, dtype=torch.int8)
    extreme[::2] = -127
    return torch.equal(torch._int_mm(extreme[:1], extreme.T), extreme[:1].int() @ extreme.int().T)


def few(dim: int) -> int:
    """For how many queries of this size products in eight bits are faster than those in float32; 0 for none."""
    if native.library() is not None:
        return 16
    return 8 if products_are_exact(dim) else 0


def best_of_coded(
    queries: Tensor, coded: Coded, keys: Tensor, k: int, removed: Tensor | None = None
) -> tuple[Tensor, Tensor, list[int]]:
    """Exact neighbours of a few queries, by the compiled library where it can.

    Each of the k groups with the largest lower bounds holds a key whose score is at least the k-th of these bounds: a
    row whose upper bound is below that is not among the best. The others are scored in float32.

    Args:
        queries: (q, D) float32 on the CPU.
        coded: The first of the keys, so many that they :func:`fits`.
        keys: (n, D), any floating dtype: those that were coded, and perhaps some behind them, which are all scored.
        k: Rows wanted.
        removed: (m,) bool: rows that do not count; those from m on do.

    Returns:
        Rows (q, k) int64, -1 where too few count; scores (q, k) float32, best first; and the numbers of the queries
        that are not answered, since too many keys are alike: those are to be scanned.
    """
    if native.suits(keys, k) and (removed is None or removed.device.type == "cpu"):
        return native.scan_coded(queries, coded, keys, k, max(_MOST * k, len(keys) // 16), removed)
    asked = CodedQueries.of(queries)
    products = _products(asked.codes, coded)
    gone = None if removed is None else removed.cpu().numpy()
    if gone is not None:
        products.index_fill_(1, torch.from_numpy(np.flatnonzero(gone[: coded.size])), _LOWEST)
    tops = largest(products)
    lowest, highest = asked.bounds(tops, coded)
    if gone is not None:
        lowest[tops == _LOWEST] = -np.inf

    rows, scores = np.empty((len(tops), k), dtype=np.int64), np.empty((len(tops), k), dtype=np.float32)
    flat, others, behind = products.numpy(), np.arange(coded.size, len(keys)), keys[coded.size :].float()
    unanswered = []
    for number, unit in enumerate(asked.units):
        reaching = _reaching(flat[number], lowest[number], highest[number], coded, k)
        if reaching is None:
            unanswered.append(number)
            continue
        found = _scores(keys, reaching, unit)
        if len(others):
            found = np.concatenate((found, torch.mv(behind, unit).numpy()))
            reaching = np.concatenate((reaching, others))
        if gone is not None:
            inside = reaching < len(gone)
            inside[inside] = gone[reaching[inside]]
            found[inside] = -np.inf
        best = (-found).argsort()[:k]
        reaching.take(best, out=rows[number])
        found.take(best, out=scores[number])
    if asked.sizes is not None:
        scores *= asked.sizes
    if gone is not None:
        rows[scores == -np.inf] = -1
    return torch.from_numpy(rows), torch.from_numpy(scores), unanswered


def _products(codes: NDArray[np.int8], coded: Coded) -> Tensor:
    """(q, n) int32, valid until the next call."""
    count = len(codes)
    if count in _SLOW:
        codes = np.concatenate((codes, np.zeros((_SLOW.stop - count, codes.shape[1]), dtype=np.int8)))
    room = _kept.room(len(codes), coded.size)
    return torch._int_mm(torch.from_numpy(codes), coded.codes.T, out=room)[:count]


def _reaching(products: NDArray[np.int32], lowest: Floats, highest: Floats, coded: Coded, k: int) -> Rows | None:
    """Rows (C,) that may be among the k best; None where they are too many to be worth it."""
    least = np.partition(lowest, len(lowest) - k)[len(lowest) - k]
    groups = (highest >= least).nonzero()[0]
    if len(groups) > _MOST * k:
        return None
    rows = members(groups)
    # Halves, since a sum of the two bounds could overflow.
    slack = 0.5 * highest.take(groups) - 0.5 * lowest.take(groups)
    bounds = products.take(rows).astype(np.float32)
    bounds *= coded.scales.take(groups)[:, None]
    reaching: Rows = rows[bounds >= (least - slack)[:, None]]
    return reaching if k <= len(reaching) <= _MOST * k else None


def _scores(keys: Tensor, rows: Rows, query: Tensor) -> Floats:
    """Exact scores (C,) of rows of keys (n, D)."""
    if keys.dtype == torch.float32:
        vectors = torch.from_numpy(keys.numpy().take(rows, axis=0))
    else:
        vectors = keys.index_select(0, torch.from_numpy(rows)).float()
    # Products by torch throughout: the threads that numpy's library wakes keep spinning on the core that torch's need.
    scores: Floats = torch.mv(vectors, query).numpy()
    return scores
