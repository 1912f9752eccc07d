"""Quality of retrieval by where in its window a query stands.

Queries are rotated to their local position while memory keys stand at position 0, so what is found changes along the
window; and the first queries of a window have next to no local context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_fot.evaluation.measures.retrieval import RetrievalQuality, live_quality, sample_rows

if TYPE_CHECKING:
    from lightning_fot.memory.base import BaseLayer
    from lightning_fot.model.lm import MemoryLM

FIRST_BUCKET = 16
GROWTH = 4


def position_buckets(window: int) -> list[tuple[int, int]]:
    """(first, last) local positions of each bucket, 16 positions at first and then four times as far; the same for
    every window that reaches them, so that runs compare.

    Args:
        window: Local positions in all, at least 1.

    Example:
        >>> position_buckets(256)
        [(0, 15), (16, 63), (64, 255)]
    """
    buckets, start, stop = [], 0, FIRST_BUCKET
    while start < window:
        buckets.append((start, stop - 1))
        start, stop = stop, stop * GROWTH
    return buckets


def quality_by_position(
    lm: MemoryLM, number: int, layer: BaseLayer, queries: Tensor, tokens: int, count: int
) -> dict[str, RetrievalQuality]:
    """What a memory layer finds for the queries of one window, in buckets of local position.

    Args:
        lm: The model.
        number: The layer.
        layer: Its memory, as the window found it.
        queries: (B·G, R·T, D), all queries of a window that starts at local position 0, as they were recorded.
        tokens: T.
        count: Queries measured of each bank, in all buckets together; each bucket gets the same share, however short.

    Returns:
        By ``"16-63"`` and the like.
    """
    banks, folded, dim = queries.shape
    by_place = queries.reshape(banks, folded // tokens, tokens, dim)
    buckets = position_buckets(tokens)
    share = max(1, count // len(buckets))
    found = {}
    for first, last in buckets:
        part = by_place[:, :, first : last + 1].flatten(1, 2)
        found[f"{first}-{last}"] = live_quality(lm, number, layer, sample_rows(part, share))
    return found
