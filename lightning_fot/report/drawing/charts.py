"""The page's charts as SVG, each in a narrow form for phones and a wide one."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_fot.report.content import curves, formats, read
from lightning_fot.report.content.scales import linear, logarithmic, nice_ticks
from lightning_fot.report.drawing.svg import MARKERS, Chart, swatch

WIDTHS = {"narrow": 350, "wide": 900}
_KIND_MARKERS = {"k-none": "diamond", "k-exact": "square", "k-index": "circle"}


def _marker(style: str) -> str:
    return _KIND_MARKERS[style] if style in _KIND_MARKERS else MARKERS[int(style[1:]) % len(MARKERS)]


def values(lines: Sequence[curves.Line], form: str, title: str, x_name: str, y_name: str) -> str:
    """Values of each memory kind against context length or the like, with error bars of one standard error."""
    chart = Chart(WIDTHS[form], 260 if form == "narrow" else 300, title)
    contexts = sorted({context for line in lines for context in line.contexts})
    lows = [value - (error or 0) for line in lines for value, error in zip(line.values, line.errors, strict=True)]
    highs = [value + (error or 0) for line in lines for value, error in zip(line.values, line.errors, strict=True)]
    left, top, right, bottom = chart.plot
    room = max(0.03 * (max(highs) - min(lows)), 1e-3 * abs(max(highs)))
    y_ticks = nice_ticks(min(lows) - room, max(highs) + room)
    y = linear(y_ticks[0][0], y_ticks[-1][0], bottom, top)
    inset = 34
    if len(contexts) == 1:
        x = linear(contexts[0] - 1, contexts[0] + 1, left + inset, right - inset)
    else:
        x = logarithmic(contexts[0], contexts[-1], left + inset, right - inset)
    chart.axes(
        _thinned([(x(context), formats.tokens(context)) for context in contexts]),
        [(y(value), label) for value, label in y_ticks],
        x_name,
        y_name,
    )
    for index, (line, css) in enumerate(zip(lines, curves.styles(lines), strict=True)):
        # Equal values would hide each other: the lines are set a few pixels apart.
        shift = (index - (len(lines) - 1) / 2) * 7
        points = [(x(context) + shift, y(value)) for context, value in zip(line.contexts, line.values, strict=True)]
        chart.path(points, f"line {css}")
        for (px, py), context, value, error in zip(points, line.contexts, line.values, line.errors, strict=True):
            tip = f"{line.name}, {formats.tokens(context)}: {formats.fixed(value)}"
            if error is not None:
                for end in (value - error, value + error):
                    chart.line(px - 3, y(end), px + 3, y(end), f"bar {css}")
                chart.line(px, y(value - error), px, y(value + error), f"bar {css}")
                tip += f" ± {formats.fixed(error)}"
            chart.marker(px, py, _marker(css), css, tip)
    return chart.svg(form)


def values_legend(lines: Sequence[curves.Line]) -> list[tuple[str, str]]:
    """Samples and names of the lines."""
    return [(swatch(_marker(css), css), line.name) for css, line in zip(curves.styles(lines), lines, strict=True)]


def recall_speed(data: curves.RecallSpeed, form: str) -> str:
    """Recall (logit) against queries a second (logarithmic), with Pareto fronts and the exact points."""
    height = 330 if form == "narrow" else 430
    chart = Chart(WIDTHS[form], height, f"{data.x_name} against speed", left=44, right=22)
    left, top, right, bottom = chart.plot
    slowest, fastest, ticks = data.speed_axis()
    y = logarithmic(slowest, fastest, bottom, top)
    x = linear(0, 1, left + 14, right - 6)
    x_ticks = [(x(data.place(tick)), f"{tick:g}") for tick in data.ticks]
    chart.axes(
        [*_thinned(x_ticks, 24), (x(1), "1")],
        [(y(value), label) for value, label in ticks],
        f"{data.x_name} (further right is better)",
        "queries per second (higher is better)",
    )
    # Above the last tick the axis jumps to 1, which a logit scale cannot show.
    jump = (x(data.place(data.ticks[-1])) + x(1)) / 2
    chart.line(jump, top, jump, bottom, "grid dashed")
    for series in data.series:
        css = f"c{series.color % 6}"
        front = [(x(data.place(point.recall)), y(point.qps)) for point in series.front()]
        own = len(series.steps())
        tried = [(x(data.place(point.recall)), y(point.qps)) for point in series.tried()]
        chart.path(tried, f"line faint {css}")
        chart.path(front[:own], f"line {css}")
        # Between the index's best and exact search nothing was measured.
        chart.path(front[max(0, own - 1) :], f"line dots {css}")
    # All marks first: labels then keep clear of every one of them.
    for series in data.series:
        css, shape = f"c{series.color % 6}", MARKERS[series.color % len(MARKERS)]
        for point in series.points:
            state = ("" if point.on_front else " dominated") + ("" if point.index_used else " hollow")
            place = (x(data.place(point.recall)), y(point.qps))
            if point.configured:
                chart.parts.append(f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="9" class="ring {css}"/>')
            clear = 5.0 if point.configured else 1.0
            chart.marker(*place, "star" if point.exact else shape, css + state, point.tip, clear=clear)
    for series, point in data.labelled():
        chart.label(x(data.place(point.recall)), y(point.qps), point.label, f"label c{series.color % 6}")
    return chart.svg(form)


def recall_speed_legend(data: curves.RecallSpeed) -> list[tuple[str, str]]:
    """Samples and names of the series and of the special marks."""
    items = [
        (swatch(MARKERS[series.color % len(MARKERS)], f"c{series.color % 6}"), series.name) for series in data.series
    ]
    points = [point for series in data.series for point in series.points]
    if any(point.exact for point in points):
        items.append((swatch("star", "k-exact", line=False), "exact search"))
    if any(point.configured for point in points):
        items.append((swatch("ring", "k-ring", line=False), "setting of this run"))
    if any(not point.index_used for point in points):
        items.append((swatch("circle", "k-exact hollow", line=False), "index not used, memory too small"))
    return items


def losses(found: Sequence[read.Curve], form: str) -> str:
    """Loss against step: each logged value faint, a moving average on top."""
    chart = Chart(WIDTHS[form], 240 if form == "narrow" else 300, "Loss against training step")
    left, top, right, bottom = chart.plot
    values = [value for curve in found for value in curve.values]
    steps = [step for curve in found for step in curve.steps]
    y_ticks = nice_ticks(min(values), max(values))
    x_ticks = [tick for tick in nice_ticks(min(steps), max(steps)) if min(steps) <= tick[0] <= max(steps) * 1.001]
    y = linear(y_ticks[0][0], y_ticks[-1][0], bottom, top)
    x = linear(min(steps), max(max(steps), min(steps) + 1), left + 10, right - 10)
    chart.axes(
        _thinned([(x(value), label) for value, label in x_ticks if float(value).is_integer()]),
        [(y(value), label) for value, label in y_ticks],
        "training step",
        "loss (nats per token)",
    )
    for index, curve in enumerate(found):
        css = f"c{index % 6}"
        points = [(x(step), y(value)) for step, value in zip(curve.steps, curve.values, strict=True)]
        if len(points) > 15:
            chart.path(points, f"line faint {css}")
            averaged = read.smoothed(curve.values)
            points = [(px, y(value)) for (px, _), value in zip(points, averaged, strict=True)]
            chart.path(points, f"line {css}")
        else:
            chart.path(points, f"line {css}")
            for (px, py), step, value in zip(points, curve.steps, curve.values, strict=True):
                tip = f"{curve.name}, step {step:.0f}: {formats.fixed(value, 3)}"
                chart.marker(px, py, "circle", css, tip, 3.0)
    return chart.svg(form)


def loss_legend(found: Sequence[read.Curve]) -> list[tuple[str, str]]:
    """Samples and names of the loss curves."""
    return [(swatch("", f"c{index % 6}"), curve.name) for index, curve in enumerate(found)]


def _thinned(ticks: list[tuple[float, str]], gap: float = 14) -> list[tuple[float, str]]:
    """Ticks without those whose labels would touch the one before; the last one always stays."""
    kept: list[tuple[float, str]] = []
    for position, label in reversed(ticks):
        width = 6.2 * len(label)
        if not kept or kept[-1][0] - position >= max(gap, (width + 6.2 * len(kept[-1][1])) / 2 + 8):
            kept.append((position, label))
    return kept[::-1]
