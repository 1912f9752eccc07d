"""Fair timing on a machine that is not quiet: rivals take turns, and ratios are formed within a turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the ratios of several rounds."""

    median: float
    low: float
    high: float
    rounds: int

    def as_dict(self, name: str) -> dict[str, float]:
        """Fields of a results row."""
        return {name: self.median, f"{name}_q1": self.low, f"{name}_q3": self.high}


def interleave(methods: Mapping[str, Callable[[], float]], rounds: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Lets methods take turns, in reversed order in every other round.

    Args:
        methods: Each call measures itself once and returns seconds.
        rounds: Times that each is measured.
        warm_up: One round before, whose times are dropped.

    Returns:
        Seconds of each method, one a round: entries of one place were measured side by side.
    """
    names = list(methods)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1 if warm_up else 0, rounds):
        for name in names if number % 2 else reversed(names):
            measured = methods[name]()
            if number >= 0:
                seconds[name].append(measured)
    return seconds


def ratio(seconds: Mapping[str, list[float]], top: str, bottom: str) -> Ratio:
    """``top`` over ``bottom``, round by round."""
    return spread([a / b for a, b in zip(seconds[top], seconds[bottom], strict=True)])


def spread(values: list[float]) -> Ratio:
    """Median and quartiles."""
    if len(values) < 2:
        return Ratio(values[0], values[0], values[0], len(values))
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(statistics.median(values), low, high, len(values))


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """The call as a method that measures itself."""

    def measure() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return measure


@dataclass
class Stamps:
    """A streamer for ``generate`` that notes when each token came, and a counter at that time.

    Args:
        probe: Read at every token, for instance the seconds that searches took so far.
    """

    probe: Callable[[], float] = lambda: 0.0
    times: list[float] = field(default_factory=list)
    probed: list[float] = field(default_factory=list)

    def put(self, value: Any) -> None:
        """Called by ``generate``: first with the prompt, then with each token."""
        self.times.append(time.perf_counter())
        self.probed.append(self.probe())

    def end(self) -> None:
        """Called by ``generate`` when it is done."""

    def steps(self, skip: int = 2) -> list[float]:
        """Seconds between tokens. The first step holds the prompt; further ones grow the caches and are skipped too."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)][skip:]

    def probed_steps(self, skip: int = 2) -> list[float]:
        """How far the probe moved in each of :meth:`steps`."""
        return [after - before for before, after in zip(self.probed, self.probed[1:], strict=False)][skip:]


def bandwidth(quick: bool = False) -> float:
    """Bytes a second that this process reads from memory: the best of several sums over a large array."""
    array = torch.ones((1 << 24) if quick else (1 << 27))
    return array.nbytes / min(timed(array.sum)() for _ in range(3 if quick else 8))


def product_rate(queries: int, keys: int, dim: int) -> float:
    """FLOP a second of the matrix product that an exact search makes: (queries, dim) by (dim, keys).

    In the form that is fastest here: keys in blocks, whose scores are written over those of the block before and so
    stay in the processor's cache.
    """
    left, parts = torch.randn(queries, dim), torch.split(torch.randn(keys, dim), 2048)
    scores = {len(part): torch.empty(queries, len(part)) for part in parts}

    def products() -> None:
        for part in parts:
            torch.mm(left, part.T, out=scores[len(part)])

    return 2 * queries * keys * dim / min(timed(products)() for _ in range(5))


def available_bytes() -> int:
    """Memory that can be taken without swapping; a very large number where the system does not tell."""
    found = 1 << 62
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        if limit != "max":
            found = min(found, int(limit) - used)
    except OSError:
        pass
    return found


def fits(need: int) -> bool:
    """Whether ``need`` bytes leave a seventh of the free memory."""
    return need <= 0.85 * available_bytes()
