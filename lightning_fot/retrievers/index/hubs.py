"""Keys that many queries want: found from past queries, kept out of the index and scored exactly.

The first token of a window has a key that takes a third or more of all top-k slots (retrievers.md, section 3). In a
graph such keys crowd the candidate list, and the search ends before it reaches the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fot.retrievers.keys.scan import topk_rows

_SAMPLE = 256
_NEIGHBOURS = 32
_MIN_SAMPLE = 64
_WANTED_BY = 0.02
_MOST = 64  # at most one key in this many is a hub


@dataclass(frozen=True)
class HubDetector:
    """Decides which keys are hubs.

    Attributes:
        queries: (m, D) past queries, or empty when too few were seen.
        thresholds: (m,) the score that the 32nd neighbour of each had when this was fitted.
        short: Raw norm below which a key counts as a sink, whatever the queries say.
    """

    queries: Tensor
    thresholds: Tensor
    short: float

    def find(self, keys: Tensor) -> Tensor:
        """Positions (h,) int64 of the hubs among keys (n, D), at most n / 64 of them, the most wanted ones."""
        keys = keys.float()
        wanted = torch.zeros(keys.shape[0], dtype=torch.float32)
        if len(self.queries):
            for start in range(0, keys.shape[0], 16384):
                scores = self.queries @ keys[start : start + 16384].T
                wanted[start : start + 16384] = (scores >= self.thresholds.unsqueeze(1)).float().mean(dim=0)
        sinks = keys.norm(dim=1) < self.short
        weight = torch.where(sinks, wanted + 1, torch.where(wanted >= _WANTED_BY, wanted, 0.0))
        best = weight.topk(min(keys.shape[0], max(1, keys.shape[0] // _MOST)))
        return best.indices[best.values > 0].sort().values


def fit_hubs(keys: Tensor, past_queries: Tensor, share: float = 1.0) -> HubDetector:
    """Learn what a hub is in one bank.

    Args:
        keys: (n, D), any floating dtype.
        past_queries: (m, D) float32; below 64 only unusually short keys count as hubs.
        share: Which share of the bank's keys these are: fewer of them are among a query's 32 nearest.
    """
    norms = keys.float().norm(dim=1)
    short = 0.5 * float(norms.median())
    if float((norms < short).float().mean()) > 1 / _MOST:
        # Short keys are common here, so being short means nothing.
        short = 0.0
    if len(past_queries) < _MIN_SAMPLE:
        return HubDetector(past_queries[:0], past_queries.new_zeros(0), short)
    picked = torch.linspace(0, len(past_queries) - 1, min(_SAMPLE, len(past_queries)), dtype=torch.float64).long()
    sample = past_queries[picked]
    _, scores = topk_rows(sample, keys, max(1, round(share * _NEIGHBOURS)))
    return HubDetector(sample, scores[:, -1], short)
