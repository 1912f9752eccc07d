"""Wall time of search calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SearchTimes:
    """Wall time of search calls.

    Args:
        p50_ms: Median of a call.
        p95_ms: 95th percentile of a call.
        p99_ms: 99th percentile of a call.
        qps: Queries a second at the median.
        calls: Calls timed.
    """

    p50_ms: float
    p95_ms: float
    p99_ms: float
    qps: float
    calls: int

    @classmethod
    def from_seconds(cls, seconds: Iterable[float], queries_a_call: int) -> SearchTimes:
        """Percentiles of call times; the slowest call stands for a percentile that too few calls resolve."""
        ordered = sorted(seconds)

        def at(share: float) -> float:
            return 1e3 * ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]

        median = 1e3 * (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        return cls(median, at(0.95), at(0.99), 1e3 * queries_a_call / max(median, 1e-9), len(ordered))


def time_calls(call: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of ``repeats`` calls, after one that warms up."""
    call()
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return seconds


def synchronise(device: torch.device) -> None:
    """Waits until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
