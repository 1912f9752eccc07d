"""What more keys would cost: power laws through measured sizes, with their error, and what they say of larger ones.

A law is also fitted without the largest size and asked for it: how far off it is there tells more than how well it
fits what it has seen.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FAR = (100_000_000, 1_000_000_000)
_LEAST_SIZES = 3
_FITTED = ("search_ms_p50", "build_s", "bytes")


def fit_power(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """``value = a · size^b`` by least squares of the logarithms.

    Returns:
        a, b, and the largest factor by which a measured value lies off the line.

    Example:
        >>> a, b, error = fit_power([10, 100, 1000], [20, 200, 2000])
        >>> round(a, 6), round(b, 6), round(error, 6)
        (2.0, 1.0, 1.0)
    """
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    slope, start = statistics.linear_regression(x, y)
    off = max(abs(other - start - slope * one) for one, other in zip(x, y, strict=True))
    return math.exp(start), slope, math.exp(off)


def cost_model(rows: Iterable[Mapping[str, Any]], sizes: Sequence[int] = FAR) -> list[dict[str, Any]]:
    """For each retriever, setting, layer and batch that was measured at three sizes or more: its power laws.

    Sizes below which a retriever searched exactly say nothing of its index: they do not count.

    Args:
        rows: Measured rows, with ``memory_tokens``, ``banks`` and ``dim`` among their fields.
        sizes: Keys a head to speak of.

    Returns:
        Rows with ``retriever``, ``layer``, ``batch``, ``k``, ``setting``, ``measured`` (sizes), ``recall`` (of each,
        since the same setting finds less of more keys), and for each of search_ms_p50, build_s and bytes ``exponent``,
        ``error`` (the largest factor off the line), ``held_out`` (what a law without the largest size says of it, over
        what was measured there; None for three sizes) and ``at`` (size → value). ``gigabytes`` at a size are those of
        the index and of float32 keys and values beside it. An extrapolation over more than a factor of ten is a guess:
        the rows say over how much it goes (``beyond``).
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("index_used") is False:
            continue
        query = json.dumps(row.get("query") or {}, sort_keys=True)
        name = (str(row["retriever"]), str(row.get("build", "")), query, str(row["layer"]), str(row["batch"]))
        groups.setdefault((*name, str(row["k"])), []).append(row)
    found = []
    for group in groups.values():
        by_size = {int(row["memory_tokens"]): row for row in group}
        if len(by_size) < _LEAST_SIZES:
            continue
        first, measured = group[0], sorted(by_size)
        laws: dict[str, Any] = {}
        for field in _FITTED:
            points = [(size, float(by_size[size][field])) for size in measured if by_size[size][field] > 0]
            if len(points) < _LEAST_SIZES:
                continue
            a, b, error = fit_power(*zip(*points, strict=True))
            at = {str(size): a * size**b for size in sizes}
            laws[field] = {"exponent": b, "error": error, "held_out": _held_out(points), "at": at}
        if "bytes" in laws:
            pairs = 8 * first["banks"] * first["dim"]
            laws["gigabytes"] = {str(size): (laws["bytes"]["at"][str(size)] + size * pairs) / 1e9 for size in sizes}
        found.append(
            {
                "retriever": first["retriever"],
                "setting": " ".join([str(first.get("build", "")), *_words(first.get("query") or {})]).strip(),
                "layer": first["layer"],
                "batch": first["batch"],
                "k": first["k"],
                "measured": measured,
                "recall": [by_size[size].get("recall") for size in measured],
                "beyond": sizes[0] / measured[-1],
                **laws,
            }
        )
    return found


def _held_out(points: Sequence[tuple[float, float]]) -> float | None:
    """The law of all sizes but the largest, at the largest, over what was measured there."""
    *seen, (size, value) = points
    if len(seen) < _LEAST_SIZES:
        return None
    a, b, _ = fit_power(*zip(*seen, strict=True))
    return float(a * size**b / value)


def _words(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]
