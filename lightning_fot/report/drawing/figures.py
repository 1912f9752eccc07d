"""The figures as PNG, drawn with matplotlib (Agg, no global state) from the same curves as the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_fot.errors import MissingLibraryError
from lightning_fot.report.content import curves, formats, read, time_tables
from lightning_fot.report.drawing.labels import Placer
from lightning_fot.system.files import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

INK, SOFT, FAINT, GRID = "#191b1f", "#565c66", "#858b95", "#ecedef"
COLORS = ("#2257bf", "#c4501b", "#14806f", "#8a3fa3", "#9a6b00", "#c02a63")
MARKERS = ("o", "s", "^", "D")
PARTS = {"model": "#b9bec6", "search": COLORS[0], "insert": COLORS[1], "build": COLORS[2]}
_KINDS = {"k-none": ("#8b9099", "D"), "k-exact": (INK, "s"), "k-index": ("#2257bf", "o")}
DPI = 200


def write_recall_vs_speed(results: read.Row, path: Path) -> bool:
    """Write recall against speed; False when nothing was measured."""
    data = curves.recall_speed(results)
    if data is None:
        return False
    figure = _figure(7.6, 4.7)
    axes = figure.add_subplot()
    draw_recall_speed(axes, data)
    axes.set_title(_retrieval_title(results, data), loc="left", fontsize=12, color=INK, pad=14)
    _save(figure, path)
    return True


def write_perplexity(results: read.Row, path: Path) -> bool:
    """Write perplexity against context length; False when nothing was measured."""
    return _write_lines(curves.perplexity_lines(results), draw_perplexity, "Perplexity of held-out text", path)


def write_distraction(results: read.Row, path: Path) -> bool:
    """Write what attention stays with the own document against documents in the memory; False when not measured."""
    return _write_lines(curves.distraction_lines(results), draw_distraction, "Distraction", path)


def _write_lines(
    lines: list[curves.Line], draw: Callable[[Axes, list[curves.Line]], None], title: str, path: Path
) -> bool:
    if not lines:
        return False
    figure = _figure(7.6, 4.4)
    axes = figure.add_subplot()
    draw(axes, lines)
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=14)
    _save(figure, path)
    return True


def write_time_split(results: read.Row, path: Path) -> bool:
    """Write what reading and answering took, a stacked bar a memory kind; False when it was not recorded."""
    found = time_tables.groups(results)
    if not found:
        return False
    figure = _figure(7.6, 0.7 + sum(0.6 + 0.32 * len(group.bars) for group in found))
    drawn = figure.subplots(len(found), 1, squeeze=False, height_ratios=[1 + len(group.bars) for group in found])
    for axes, group in zip(drawn[:, 0], found, strict=True):
        for place, bar in enumerate(group.bars):
            left = 0.0
            for name, value in bar.parts.items():
                axes.barh(place, value, left=left, height=0.7, color=PARTS[name])
                left += value
            axes.text(left, place, f" {formats.significant(bar.total, 2)}", va="center", fontsize=8.5, color=SOFT)
        _style(axes, "", "")
        axes.grid(visible=False)
        axes.set_yticks(range(len(group.bars)), [bar.name for bar in group.bars])
        axes.set_ylim(len(group.bars) - 0.5, -0.5)
        axes.set_xlim(0, 1.12 * max(bar.total for bar in group.bars))
        axes.set_title(group.title, loc="left", fontsize=9.5, color=INK)
    drawn[-1, 0].set_xlabel("milliseconds a token", color=SOFT, fontsize=9.5)
    handles = [_patch(color, name) for name, color in PARTS.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=4, frameon=False, fontsize=9, labelcolor=SOFT)
    _save(figure, path)
    return True


def _patch(color: str, name: str) -> Patch:
    from matplotlib.patches import Patch

    return Patch(color=color, label=name)


def write_overview(results: read.Row, path: Path) -> bool:
    """Write both figures side by side, as for a README; False when one of them has no data."""
    lines, data = curves.perplexity_lines(results), curves.recall_speed(results)
    if not lines or data is None:
        return False
    figure = _figure(12.4, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    draw_perplexity(left, lines)
    left.set_title("What a memory is worth", loc="left", fontsize=12.5, color=INK, pad=14)
    draw_recall_speed(right, data)
    title = "What an index costs and gains"
    right.set_title(title, loc="left", fontsize=12.5, color=INK, pad=14)
    _save(figure, path)
    return True


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingLibraryError("matplotlib", "pip install matplotlib", "the report's figures", str(error)) from error
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.06)  # type: ignore[union-attr,call-arg]
    return figure


def _save(figure: Figure, path: Path) -> None:
    with writing(path) as fresh:
        figure.savefig(fresh, format="png")


def _retrieval_title(results: read.Row, data: curves.RecallSpeed) -> str:
    kinds = list(dict.fromkeys(str(row.get("retriever")) for row in read.rows(results, "retrieval")))
    title = " and ".join(kinds) if kinds and kinds != ["exact"] else "Exact search"
    return f"{title}, {formats.tokens(data.memory_tokens)} keys a head" if data.memory_tokens else title


def _style(axes: Axes, x: str, y: str) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", which="both", colors=SOFT, labelsize=9, length=0)
    axes.tick_params(axis="x", which="major", length=3, color=FAINT)
    axes.set_xlabel(x, color=SOFT, fontsize=9.5)
    axes.set_ylabel(y, color=SOFT, fontsize=9.5)


def draw_perplexity(axes: Axes, lines: list[curves.Line]) -> None:
    """Draw perplexity against context length, with error bars of one standard error."""
    _draw_lines(axes, lines, "context: tokens in memory", "perplexity (lower is better)")


def draw_distraction(axes: Axes, lines: list[curves.Line]) -> None:
    """Draw what attention stays with the own document against documents in the memory."""
    _draw_lines(axes, lines, "documents in the memory", "attention that stays with the own one")


def _draw_lines(axes: Axes, lines: list[curves.Line], x_name: str, y_name: str) -> None:
    from matplotlib.font_manager import FontProperties

    contexts = sorted({context for line in lines for context in line.contexts})
    axes.set_xscale("log", base=2)
    for index, (line, style) in enumerate(zip(lines, curves.styles(lines), strict=True)):
        color, marker = _KINDS[style] if style in _KINDS else _numbered(int(style[1:]))
        # Equal values would hide each other: the lines are set slightly apart.
        x = [context * (1 + 0.02 * (index - (len(lines) - 1) / 2)) for context in line.contexts]
        errors = [error or 0.0 for error in line.errors] if any(line.errors) else None
        axes.errorbar(
            x, line.values, yerr=errors, color=color, marker=marker, markersize=5.5, linewidth=1.8, elinewidth=1.1,
            capsize=2.5, label=line.name, linestyle="--" if line.kind == "none" else "-",
            markeredgecolor="white", markeredgewidth=0.8, zorder=3 + index,
        )  # fmt: skip
    _style(axes, x_name, y_name)
    axes.set_xticks(contexts, [formats.tokens(context) for context in contexts])
    axes.minorticks_off()
    axes.set_xlim(contexts[0] / 1.25, contexts[-1] * 1.25)
    # Lines and error bars may fill the frame: the legend gets room of its own below them.
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if max(0.0, low) <= tick <= high]
    axes.set_ylim(low - 0.42 * (high - low), high)
    axes.set_yticks(ticks)
    box = axes.legend(frameon=False, fontsize=9, labelcolor=SOFT, loc="lower left", alignment="left")
    if lines[0].paired:
        box.set_title("bars: standard error of the\ndifference from no memory", prop=FontProperties(size=8.5))
        box.get_title().set_color(FAINT)


def _numbered(number: int) -> tuple[str, str]:
    """Colour and marker of a line that has none of its own."""
    return COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]


def draw_recall_speed(axes: Axes, data: curves.RecallSpeed) -> None:
    """Draw recall (logit) against queries a second (logarithmic) with Pareto fronts and the exact points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.lines import Line2D

    handles: list[Line2D] = []
    for series in data.series:
        color, marker = _numbered(series.color)
        front = series.front()
        places = [(data.place(point.recall), point.qps) for point in front]
        own = len(series.steps())
        tried = series.tried()
        axes.plot([data.place(point.recall) for point in tried], [point.qps for point in tried],
                  color=color, linewidth=1, alpha=0.25, zorder=2)  # fmt: skip
        # Between the index's best and exact search nothing was measured: dotted.
        for part, style in ((places[:own], "-"), (places[max(0, own - 1) :], ":")):
            axes.plot([x for x, _ in part], [y for _, y in part], style, color=color, linewidth=1.8, zorder=3)
        for point in series.points:
            axes.plot(
                [data.place(point.recall)], [point.qps], marker="*" if point.exact else marker, linestyle="",
                color=color, markersize=12 if point.exact else 6.5, alpha=1 if point.on_front else 0.35, zorder=5,
                markeredgewidth=0.8, markeredgecolor="white" if point.index_used else color,
                markerfacecolor=color if point.index_used else "white",
            )  # fmt: skip
            if point.configured:
                axes.plot([data.place(point.recall)], [point.qps], "o", markersize=13, markerfacecolor="none",
                          markeredgecolor=color, markeredgewidth=1.2, zorder=4)  # fmt: skip
        handles.append(Line2D([], [], color=color, marker=marker, markersize=6, linewidth=1.8, label=series.name))
    points = [point for series in data.series for point in series.points]
    if any(point.exact for point in points):
        handles.append(Line2D([], [], color=INK, marker="*", markersize=11, linestyle="", label="exact search"))
    if any(point.configured for point in points):
        handles.append(Line2D([], [], linestyle="", marker="o", markersize=10, markerfacecolor="none",
                              markeredgecolor=SOFT, label="setting of this run"))  # fmt: skip
    if any(not point.index_used for point in points):
        handles.append(Line2D([], [], linestyle="", marker="o", markersize=6, markerfacecolor="white",
                              markeredgecolor=INK, label="index not used"))  # fmt: skip
    _style(axes, f"{data.x_name} (logit scale; further right is better)", "queries per second (higher is better)")
    slowest, fastest, ticks = data.speed_axis()
    axes.set_yscale("log")
    axes.set_ylim(slowest, fastest)
    axes.minorticks_off()
    axes.set_yticks([value for value, _ in ticks], [label for _, label in ticks])
    axes.set_xlim(-0.03, 1.05)
    axes.set_xticks([*(data.place(tick) for tick in data.ticks), 1.0], [*(f"{tick:g}" for tick in data.ticks), "1"])
    axes.axvline((data.place(data.ticks[-1]) + 1) / 2, color="#d7d9dd", linewidth=0.9, linestyle=(0, (3, 4)), zorder=1)
    names = " · ".join(data.label_names)
    box = axes.legend(handles=handles, frameon=False, fontsize=9, labelcolor=SOFT, loc="best", alignment="left")
    if names:
        box.set_title(f"numbers: {names}", prop=FontProperties(size=9))
        box.get_title().set_color(SOFT)
    _label_points(axes, data)


def _label_points(axes: Axes, data: curves.RecallSpeed) -> None:
    """Query settings beside their points, where they hide nothing."""
    from matplotlib.patheffects import Normal, Stroke

    figure = axes.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]
    # Pixels: matplotlib counts y upwards, the placer downwards.
    frame, legend = axes.get_window_extent(), axes.get_legend()
    placer = Placer((frame.x0, -frame.y1, frame.x1, -frame.y0))
    if legend is not None:
        box = legend.get_window_extent()
        placer.taken.append((box.x0, -box.y1, box.x1, -box.y0))
    unit = DPI / 72
    for series in data.series:
        for point in series.points:
            x, y = axes.transData.transform((data.place(point.recall), point.qps))
            placer.keep_clear(x, -y, (7.5 if point.configured or point.exact else 4) * unit)
    for series, point in data.labelled():
        x, y = axes.transData.transform((data.place(point.recall), point.qps))
        found = placer.place(x, -y, 5.4 * unit * len(point.label), 6.8 * unit, 5.5 * unit)
        if found is not None:
            offset = ((found[0] - x) / unit, (-found[1] - y) / unit)
            axes.annotate(point.label, (data.place(point.recall), point.qps), xytext=offset, zorder=6, fontsize=8.5,
                          textcoords="offset points", color=COLORS[series.color % len(COLORS)],
                          path_effects=[Stroke(linewidth=2.5, foreground="white"), Normal()])  # fmt: skip
