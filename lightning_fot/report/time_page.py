"""The page's part on time: stacked bars, and the bounds of the machine beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from lightning_fot.report.content import formats, read, time_tables
from lightning_fot.report.content.cells import Table

# Colour classes of the style sheet; the model is what is there without a memory.
COLORS = {"model": "k-none", "search": "c0", "insert": "c1", "build": "c2"}


def section(results: read.Row, table: Callable[[Table, bool], str], download: Callable[[Table, str], str]) -> str:
    """Everything on time; empty where nothing was recorded.

    Args:
        results: Contents of ``results.json``.
        table: Writes a table, sortable or not.
        download: Writes a link that holds a table as CSV.
    """
    parts = [_bars(results)]
    if (split := time_tables.time_split(results)) is not None:
        parts.append(f'{table(split, False)}<p class="note">{download(split, "time_split")}</p>')
    if (limits := time_tables.limits(results)) is not None:
        parts.append(table(limits, False))
    parts.append(_phases(results))
    body = "".join(parts)
    return f"<h2>Where the time went</h2>{body}" if body else ""


def _bars(results: read.Row) -> str:
    found = time_tables.groups(results)
    if not found:
        return ""
    used = {name for group in found for bar in group.bars for name in bar.parts}
    legend = "".join(
        f'<li><span class="dot {css}"></span>{escape(name)}</li>' for name, css in COLORS.items() if name in used
    )
    drawn = "".join(_group(group) for group in found)
    caption = "Milliseconds a token; the bars of one step share a scale. Numbers are in the table below."
    return (
        f'<figure><ul class="legend">{legend}</ul><div class="bars">{drawn}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _group(group: time_tables.Group) -> str:
    longest = max(bar.total for bar in group.bars)
    rows = []
    for bar in group.bars:
        shares = ", ".join(f"{name} {formats.percent(value / bar.total, 0)}" for name, value in bar.parts.items())
        tip = f"{bar.name}: {formats.significant(bar.total, 3)} ms a token: {shares}"
        pieces = "".join(
            f'<i class="{COLORS[name]}" style="flex: {value / bar.total:.4f}"></i>' for name, value in bar.parts.items()
        )
        rows.append(
            f'<dt>{escape(bar.name)}</dt><dd><span class="split" style="width: {100 * bar.total / longest:.1f}%" '
            f'tabindex="0" role="img" aria-label="{escape(tip)}" data-tip="{escape(tip)}">{pieces}</span>'
            f"<span>{escape(formats.significant(bar.total, 2))} ms</span></dd>"
        )
    return f"<h3>{escape(group.title)}</h3><dl>{''.join(rows)}</dl>"


def _phases(results: read.Row) -> str:
    """The whole run, by phase."""
    parts = read.time_split(results)
    if not parts:
        return ""
    total = sum(parts.values())
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    strips = "".join(
        f'<i class="c{index % 6}" style="flex: {value / total:.4f}"></i>' for index, (_, value) in enumerate(ordered)
    )
    names = "".join(
        f'<li><span class="dot c{index % 6}"></span>{escape(name.removesuffix("_s").replace("_", " "))} '
        f"{escape(formats.duration(value))} ({value / total:.0%})</li>"
        for index, (name, value) in enumerate(ordered)
    )
    return (
        f'<h3>The whole run</h3><figure><div class="split" aria-hidden="true">{strips}</div>'
        f'<ul class="legend">{names}</ul></figure>'
    )
