"""What the figures show, apart from how they are drawn: the page (SVG) and the PNGs draw the same curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_fot.config.evaluation import whole_readings
from lightning_fot.report.content import formats, read
from lightning_fot.report.content.scales import log_ticks

RECALL_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999)
# What standard errors of perplexity are taken over (`measures.perplexity.estimate`).
SAMPLED = "over blocks of 256 tokens, not over documents"
MEASURES = {"recall": "recall@{k}", "mass_recall": "attention-mass recall"}


@dataclass(frozen=True)
class Point:
    """One measured setting of one retriever on one layer."""

    recall: float
    qps: float
    label: str
    tip: str
    exact: bool
    on_front: bool
    configured: bool
    index_used: bool


@dataclass(frozen=True)
class Series:
    """Points of one colour: one retriever on one layer, with the exact search of that layer."""

    name: str
    color: int
    points: tuple[Point, ...]

    def tried(self) -> list[Point]:
        """All settings of the index, from low to high recall."""
        return sorted((point for point in self.points if not point.exact), key=lambda point: (point.recall, -point.qps))

    def steps(self) -> list[Point]:
        """The front without exact search: what the index itself offers."""
        return [point for point in self.front() if not point.exact]

    def front(self) -> list[Point]:
        """The Pareto front, from low to high recall."""
        return sorted((point for point in self.points if point.on_front), key=lambda point: (point.recall, -point.qps))


@dataclass(frozen=True)
class RecallSpeed:
    """Recall against speed at one memory size.

    Attributes:
        series: A colour each.
        measure: Field on the x axis, ``recall`` or ``mass_recall``.
        x_name: That in words.
        label_names: Arguments that the points' labels stand for.
        memory_tokens: Memory size, when recorded.
        ticks: Recalls to mark on the axis, all below 1.
    """

    series: tuple[Series, ...]
    measure: str
    x_name: str
    label_names: tuple[str, ...]
    memory_tokens: float | None
    ticks: tuple[float, ...]

    def place(self, recall: float) -> float:
        """Where a recall lies on the axis, 0 to 1: logit-scaled up to the last tick, 1 standing apart at the end."""
        low, high = _logit(self.ticks[0]), _logit(self.ticks[-1])
        if recall >= 1:
            return 1.0
        share = (_logit(recall) - low) / ((high - low) or 1.0)
        return min(max(share, 0.0), 1.05) * 0.86

    def labelled(self) -> list[tuple[Series, Point]]:
        """Points that say their setting, the most important first: of many layers the first and the last, and the
        run's own setting.
        """
        outer = self.series if len(self.series) <= 3 else (self.series[0], self.series[-1])
        listed = [
            (series, point)
            for series in self.series
            for point in series.points
            if point.label and point.index_used and not point.exact and (series in outer or point.configured)
        ]
        return sorted(listed, key=lambda pair: (not pair[1].configured, not pair[1].on_front))

    def speed_axis(self) -> tuple[float, float, list[tuple[float, str]]]:
        """Ends of the logarithmic speed axis and the ticks between them."""
        low, high = min(self.speeds) / 1.35, max(self.speeds) * 1.35
        ticks = log_ticks(low, high)
        inside = [tick for tick in ticks if low <= tick[0] <= high]
        return (low, high, inside) if len(inside) > 1 else (ticks[0][0], ticks[-1][0], ticks)

    @property
    def speeds(self) -> list[float]:
        """All speeds, in queries a second."""
        return [point.qps for series in self.series for point in series.points]


def _logit(share: float) -> float:
    share = min(max(share, 1e-6), 1 - 1e-6)
    return math.log(share / (1 - share))


def recall_speed(results: read.Row, measure: str = "recall") -> RecallSpeed | None:
    """Points of the recall-against-speed figure; None when nothing was measured.

    Args:
        results: The run's results.
        measure: ``recall`` (share of the exact top-k found) or ``mass_recall`` (share of their softmax mass).
    """
    measured = [row for row in read.rows(results, "retrieval") if _usable(row, measure) and not read.is_exact(row)]
    exact = [row for row in read.rows(results, "exact") if _usable(row, measure)]
    if not measured and not exact:
        return None
    stored = max((read.number(row, "memory_tokens") or 0.0) for row in measured or exact)
    measured = [row for row in measured if (read.number(row, "memory_tokens") or 0.0) == stored]
    exact = [row for row in exact if (read.number(row, "memory_tokens") or 0.0) == stored]
    names = read.varying_arguments(measured)
    configured = read.configured_rows(results) if read.configured_is_certain(results) else []
    kinds = list(dict.fromkeys(str(row.get("retriever", "")) for row in measured)) or ["exact"]
    layers = sorted({row.get("layer") for row in [*measured, *exact]}, key=_layer_order)
    series: list[Series] = []
    for kind in kinds:
        for layer in layers:
            own = [row for row in measured if str(row.get("retriever", "")) == kind and row.get("layer") == layer]
            group = own + [row for row in exact if row.get("layer") == layer]
            if group:
                name = f"layer {layer}" if len(kinds) == 1 else f"{kind}, layer {layer}"
                points = _points(group, measure, names, configured)
                series.append(Series(name, len(series), points))
    k = next((read.number(row, "k") for row in [*measured, *exact] if read.number(row, "k")), None)
    x_name = MEASURES[measure].format(k="k" if k is None else f"{k:.0f}")
    below = [point.recall for one in series for point in one.points if point.recall < 1]
    return RecallSpeed(tuple(series), measure, x_name, tuple(names), stored or None, _ticks(below))


def _usable(row: read.Row, measure: str) -> bool:
    return read.number(row, measure) is not None and (read.number(row, "qps") or 0) > 0


def _layer_order(layer: object) -> tuple[float, str]:
    return (float(layer), "") if isinstance(layer, int | float) else (math.inf, str(layer))


def _ticks(recalls: list[float]) -> tuple[float, ...]:
    low = max((tick for tick in RECALL_TICKS if tick <= min(recalls, default=0.8)), default=RECALL_TICKS[0])
    high = min((tick for tick in RECALL_TICKS if tick >= max(recalls, default=0.99)), default=RECALL_TICKS[-1])
    start, end = RECALL_TICKS.index(low), RECALL_TICKS.index(high)
    if end - start < 2:
        start, end = max(0, start - 1), min(len(RECALL_TICKS) - 1, end + 1)
    return RECALL_TICKS[start : end + 1]


def _points(group: list[read.Row], measure: str, names: list[str], configured: list[read.Row]) -> tuple[Point, ...]:
    placed = [(read.number(row, measure) or 0.0, read.number(row, "qps") or 0.0) for row in group]
    front = read.pareto_front(placed)
    points = []
    for row, (recall, qps) in zip(group, placed, strict=True):
        is_exact = read.is_exact(row)
        given = read.arguments(row)
        label = "exact" if is_exact else " · ".join(str(given[name]) for name in names if name in given)
        kind = "exact search" if is_exact else f"{row.get('retriever', '')} {read.setting(row, names)}".strip()
        tip = f"{kind}, layer {row.get('layer')}: recall {formats.percent(read.number(row, 'recall'))}, "
        tip += f"mass recall {formats.percent(read.number(row, 'mass_recall'))}, {formats.tokens(qps)} queries/s"
        if not read.index_used(row):
            tip += " (searched exactly: memory too small for an index)"
        points.append(
            Point(recall, qps, label, tip, is_exact, (recall, qps) in front,
                  any(row is other for other in configured), read.index_used(row))
        )  # fmt: skip
    return tuple(points)


@dataclass(frozen=True)
class Line:
    """Values of one memory kind by context length, with one standard error each (None where not recorded).

    The errors are those of the difference from no memory on the same tokens (``paired``) where the run recorded them:
    how hard the text is cancels there, and the error of a value alone would hide a change that is sure.
    """

    kind: str
    name: str
    contexts: tuple[int, ...]
    values: tuple[float, ...]
    errors: tuple[float | None, ...]
    paired: bool


def perplexity_lines(results: read.Row) -> list[Line]:
    """Perplexity against context, one line a memory kind: none, exact, then the retriever."""
    lines: list[Line] = []
    measured = read.rows(results, "perplexity")
    paired = any(read.number(row, "gain_standard_error") is not None for row in measured)
    for kind, cells in read.by_context(measured, "value").items():
        if cells:
            values = tuple(float(row["value"]) for row in cells.values())
            errors = tuple(_error(row, paired) for row in cells.values())
            lines.append(Line(kind, memory_name(kind), tuple(cells), values, errors, paired))
    return lines


def distraction_lines(results: read.Row) -> list[Line]:
    """Share of the attention that stays with the own document, against documents in the memory, a line a memory kind.

    Of several lengths of the documents the longest counts. The last line is what chance would give.
    """
    measured = [row for row in read.rows(results, "distraction") if read.number(row, "own_share") is not None]
    longest = max((read.number(row, "context_tokens") or 0.0 for row in measured), default=0.0)
    measured = [row for row in measured if (read.number(row, "context_tokens") or 0.0) == longest]
    lines: list[Line] = []
    for kind in read.memory_kinds(measured):
        own = {int(row["documents"]): row for row in measured if row.get("memory") == kind and row.get("documents")}
        counts = tuple(sorted(own))
        values = tuple(float(own[count]["own_share"]) for count in counts)
        errors = tuple(read.number(own[count], "own_share_standard_error") for count in counts)
        lines.append(Line(kind, memory_name(kind), counts, values, errors, False))
    if lines:
        counts = tuple(sorted({count for line in lines for count in line.contexts}))
        lines.append(Line("none", "by chance", counts, tuple(1 / n for n in counts), (None,) * len(counts), False))
    return lines


def error_note(lines: Sequence[Line]) -> str:
    """What the error bars of :func:`perplexity_lines` are; empty where there are none."""
    if all(error is None for line in lines for error in line.errors):
        return ""
    if lines[0].paired:
        return f"Bars: ± one standard error of the difference from no memory on the same tokens, {SAMPLED}."
    return f"Bars: ± one standard error of each value, {SAMPLED}."


def _error(row: read.Row, paired: bool) -> float | None:
    if not paired:
        return read.standard_error(row)
    gain_error = read.number(row, "gain_standard_error")
    return None if gain_error is None else float(row["value"]) * gain_error


def memory_name(kind: str) -> str:
    """A memory kind, or a reading without a memory, in words."""
    return {"none": "no memory", "exact": "exact search", **whole_readings()}.get(kind, kind)


def styles(lines: Sequence[Line]) -> list[str]:
    """Style class of each line: that of its memory kind, the same in all figures.

    Where there are several indexes, or several runs, each has a colour of its own, ``c0`` to ``c5``.
    """
    plain = [{"none": "k-none", "exact": "k-exact"}.get(line.kind, "k-index") for line in lines]
    if plain.count("k-index") < 2:
        return plain
    numbers = itertools.count()
    return [f"c{next(numbers) % 6}" if style == "k-index" else style for style in plain]
