"""Axes: where values lie and which of them are marked."""

from __future__ import annotations

import math
from collections.abc import Callable

Scale = Callable[[float], float]
Tick = tuple[float, str]


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Map [low, high] to [start, end]."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """Map [low, high], both positive, to [start, end] by their logarithms."""
    inner = linear(math.log(low), math.log(high), start, end)
    return lambda value: inner(math.log(value))


def nice_ticks(low: float, high: float, count: int = 5) -> list[Tick]:
    """About ``count`` round values that cover [low, high]."""
    span = (high - low) or abs(high) or 1.0
    raw = span / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9) + (1 if abs(step / power - 2.5) < 1e-9 else 0))
    return [(index * step, f"{index * step:,.{decimals}f}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[Tick]:
    """Values 1, 2, 5 times powers of ten (powers alone over a wide range) that cover [low, high]."""
    factors = (1, 2, 5) if high / low < 300 else (1,)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    listed = [factor * 10.0**power for power in powers for factor in factors]
    first = max((value for value in listed if value <= low), default=listed[0])
    last = min((value for value in listed if value >= high), default=listed[-1])
    return [(value, _plain(value)) for value in listed if first <= value <= last]


def _plain(value: float) -> str:
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:g}"
