"""Exact search for a few queries: products in eight bits, then float32 for the keys that could be among the best.

The result is exact, not likely so: every key that is not scored in float32 has a score that is proved to be too small.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fot.retrievers.codes import GROUP, Coded, CodedQueries, Floats, largest, members, upper_bounds
from lightning_fot.retrievers.scan import rescore

# Of all keys at most this share is scored in float32: more, and reading all of them in order is faster.
_MOST = 1 / 16
_LOWEST = -(2**31) + 1

Rows = NDArray[np.int64]


def candidates(k: int) -> int:
    """Keys scored in float32 at first. For k = 32, 42 to 59 suffice in the median on recorded keys, 106 always."""
    return 2 * k + 64


def fits(rows: int, k: int) -> bool:
    """Whether so many coded rows are enough to leave some out."""
    return rows >= 2 * GROUP * (candidates(k) + 1)


@lru_cache(maxsize=8)
def products_are_exact(dim: int) -> bool:
    """Whether this machine multiplies eight bits, fast and without saturating on the way."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not (able.get("avx512_vnni") or able.get("avx_vnni")):
        return False
    extreme = torch.full((64, dim), 127, dtype=torch.int8)
    extreme[::2] = -127
    return torch.equal(torch._int_mm(extreme[:1], extreme.T), extreme[:1].int() @ extreme.int().T)


def best_of_coded(
    queries: Tensor, coded: Coded, keys: Tensor, k: int, removed: Tensor | None = None
) -> tuple[Tensor, Tensor, list[int]]:
    """Exact neighbours of a few queries among the coded rows.

    Args:
        queries: (q, D) float32 on the CPU.
        coded: So many rows that :func:`fits`.
        keys: (n, D) that were coded, any floating dtype, and perhaps some behind them.
        k: Rows wanted.
        removed: (m,) bool: rows that do not count; those from m on do.

    Returns:
        Rows (q, k) int64, -1 where too few count; scores (q, k) float32, best first; and the numbers of the queries for
        which nothing is proved, since too many keys are alike: those are to be scanned.
    """
    asked = CodedQueries.of(queries)
    units, factors, slack = asked.units, asked.steps * coded.scales, asked.slack(coded)
    products = torch._int_mm(asked.codes, coded.codes.T)
    if removed is not None:
        products.index_fill_(1, removed[: coded.size].nonzero()[:, 0], _LOWEST)
    flat, bounds = products.numpy(), upper_bounds(largest(products), factors, slack)
    count = candidates(k)
    groups, others = _top(bounds, count)

    rows = members(groups)
    each = np.arange(len(units))[:, None]
    inside = upper_bounds(
        flat[each[:, :, None], rows], factors[each, groups][..., None], slack[each, groups][..., None]
    )
    places, rest = _top(inside.reshape(len(units), -1), count)
    found, scores = _exact(units, keys, np.take_along_axis(rows.reshape(len(units), -1), places, axis=1), k, removed)

    # In the terms of the bounds: the score of the last one found, which no other key may exceed.
    with np.errstate(invalid="ignore"):
        last = scores[:, -1:].numpy() - (units @ coded.centre).numpy()[:, None]
    unproved = []
    for number in np.flatnonzero(~((others <= last) & (rest <= last))).tolist():
        one = slice(number, number + 1)
        more = _reaching(flat[number], bounds[number], factors[number], slack[number], last[number], k)
        if more is None:
            unproved.append(number)
        else:
            found[one], scores[one] = _exact(units[one], keys, more[None], k, removed)
    return found, scores * asked.sizes, unproved


def _top(values: Floats, count: int) -> tuple[Rows, Floats]:
    """Columns of the ``count`` largest of each row, in no order, and the largest of the others (q, 1)."""
    edge = values.shape[1] - count
    order = np.argpartition(values, edge - 1, axis=1)
    return order[:, edge:], np.take_along_axis(values, order[:, edge - 1 : edge], axis=1)


def _exact(queries: Tensor, keys: Tensor, rows: Rows, k: int, removed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k best of rows (q, C): rows and scores, -1 and -inf where too few count."""
    chosen = torch.from_numpy(rows)
    scores = rescore(queries, keys, chosen)
    if removed is not None:
        gone = (chosen < len(removed)) & removed[chosen.clamp_max(len(removed) - 1)]
        scores.masked_fill_(gone, float("-inf"))
    scores, picked = scores.topk(k, dim=1)
    return chosen.gather(1, picked).masked_fill_(scores == float("-inf"), -1), scores


def _reaching(
    products: NDArray[np.int32], bounds: Floats, factors: Floats, slack: Floats, last: Floats, k: int
) -> Rows | None:
    """Rows (C,) of which the score may reach ``last`` (1,); None where they are too many to be worth it."""
    # Not "at least": what is no number must count.
    groups = np.flatnonzero(~(bounds < last))
    if len(groups) * GROUP > 4 * _MOST * len(products):
        return None
    rows = members(groups)
    reach = rows[~(upper_bounds(products[rows], factors[groups, None], slack[groups, None]) < last)]
    return reach if k <= len(reach) <= _MOST * len(products) else None
