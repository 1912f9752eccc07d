"""What an index answered: checked, and merged with rows that are scored exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

# So many rows set apart are sorted with the others; of more, the best are chosen first.
_FEW_APART = 512


def checked_rows(answer: Any, queries: int, k: int, size: int, whole: bool = True) -> tuple[Rows, str | None]:
    """Rows (q, k) of an index that holds ``size`` keys, and why they cannot be used; None when they can.

    Without ``whole`` only shape and dtype are looked at.

    Unsigned ones (usearch): their largest value, a usual mark for "none", becomes -1.
    """
    rows = answer.detach().cpu().numpy() if isinstance(answer, Tensor) else np.asarray(answer)
    empty = np.zeros((0, 0), dtype=np.int64)
    if rows.shape != (queries, k):
        return empty, f"the index returned shape {tuple(rows.shape)} instead of {(queries, k)}"
    if rows.dtype.kind not in "iu":
        return empty, f"the index returned {rows.dtype} instead of row numbers"
    if rows.dtype != np.int64:
        rows = rows.astype(np.int64)
    if not (rows.flags.c_contiguous and rows.flags.writeable):
        rows = rows.copy()
    if not whole:
        return rows, None
    if queries == 1:
        # Python beats array operations on a handful of numbers.
        line = rows[0].tolist()
        if min(line) < -1 or max(line) >= size:
            return empty, f"the index returned rows outside -1 to {size - 1}"
        twice = len(set(line)) < k and len(set(line)) < k - max(0, line.count(-1) - 1)
    else:
        ordered = np.sort(rows, axis=1)
        if ordered[:, 0].min() < -1 or ordered[:, -1].max() >= size:
            return empty, f"the index returned rows outside -1 to {size - 1}"
        same = ordered[:, 1:] == ordered[:, :-1]
        twice = bool(same.any()) and bool((same & (ordered[:, 1:] >= 0)).any())
    return (empty, "the index returned a row twice") if twice else (rows, None)


def merged_few(
    queries: Floats, keys: Floats, rows: Rows, hidden: Flags, apart: Rows, apart_keys: Floats, k: int
) -> Rows:
    """Rows (q, at most k) of an index merged with rows set apart, by exact scores: for a few queries.

    Args:
        queries: (q, D).
        keys: (n, D) of the bank.
        rows: (q, w) candidates, -1 where there is none.
        hidden: (n,), True for rows set apart.
        apart: (h,) the same rows, at least one.
        apart_keys: (h, D).
        k: Rows wanted; fewer than n.
    """
    count = len(rows)
    scores = np.matmul(keys.take(rows, axis=0), queries[:, :, None])[:, :, 0]
    others = queries @ apart_keys.T
    theirs = apart[None] if count == 1 else np.broadcast_to(apart, (count, len(apart)))
    if len(apart) > max(k, _FEW_APART):
        picked = np.argpartition(others, len(apart) - k, axis=1)[:, -k:]
        others, theirs = np.take_along_axis(others, picked, axis=1), apart[picked]
    out = hidden.take(rows) | (rows < 0)
    if out.any():
        rows = np.where(out, -1, rows)
        scores[out] = -np.inf
    every = np.concatenate((scores, others), axis=1)
    best = (-every).argsort(axis=1)[:, :k]
    if count > 1:
        best += np.arange(0, every.size, every.shape[1])[:, None]
    found: Rows = np.concatenate((rows, theirs), axis=1).ravel().take(best)
    return found
