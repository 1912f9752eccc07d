"""The page's part on time: stacked bars, and the bounds of the machine beside what was measured."""

from __future__ import annotations

from typing import Any

from lightning_fot.report.content import formats, read, time_tables

# Colour classes of the style sheet; the model is what is there without a memory.
COLORS = {"model": "k-none", "search": "c0", "insert": "c1", "build": "c2"}


def parts(results: read.Row) -> dict[str, Any]:
    """What ``time.html.j2`` shows; empty parts where nothing was recorded.

    Args:
        results: Contents of ``results.json``.
    """
    found = time_tables.groups(results)
    used = {name for group in found for bar in group.bars for name in bar.parts}
    return {
        "groups": [{"title": group.title, "bars": _bars(group)} for group in found],
        "legend": [(name, css) for name, css in COLORS.items() if name in used],
        "split": time_tables.time_split(results),
        "limits": time_tables.limits(results),
        "phases": _phases(results),
    }


def _bars(group: time_tables.Group) -> list[dict[str, Any]]:
    longest = max(bar.total for bar in group.bars)
    found = []
    for bar in group.bars:
        shares = ", ".join(f"{name} {formats.percent(value / bar.total, 0)}" for name, value in bar.parts.items())
        found.append(
            {
                "name": bar.name,
                "tip": f"{bar.name}: {formats.significant(bar.total, 3)} ms a token: {shares}",
                "width": 100 * bar.total / longest,
                "pieces": [(COLORS[name], value / bar.total) for name, value in bar.parts.items()],
                "total": formats.significant(bar.total, 2),
            }
        )
    return found


def _phases(results: read.Row) -> list[dict[str, Any]]:
    """The whole run, by phase, the longest first."""
    seconds = read.time_split(results)
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda part: -part[1])
    return [
        {
            "css": f"c{index % 6}",
            "share": value / total,
            "said": f"{name.removesuffix('_s').replace('_', ' ')} {formats.duration(value)} ({value / total:.0%})",
        }
        for index, (name, value) in enumerate(ordered)
    ]
