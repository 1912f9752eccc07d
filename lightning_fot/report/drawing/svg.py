"""A small SVG writer: axes, marks and labels that take their colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from lightning_fot.report.drawing.labels import Placer

MARKERS = ("circle", "square", "triangle", "diamond")


@dataclass
class Chart:
    """One picture, drawn from the back to the front.

    Args:
        width: Width in pixels at scale 1.
        height: Height in pixels at scale 1.
        title: What it shows, for screen readers.
        left: Room for the labels of the y axis.
        bottom: Room for those of the x axis and its name.
    """

    width: int
    height: int
    title: str
    left: int = 46
    right: int = 16
    top: int = 26
    bottom: int = 44
    parts: list[str] = field(default_factory=list)
    placer: Placer = field(init=False)

    def __post_init__(self) -> None:
        left, top, right, bottom = self.plot
        self.placer = Placer((left, top - 8, right + self.right - 2, bottom))

    @property
    def plot(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the plotting area."""
        return self.left, self.top, self.width - self.right, self.height - self.bottom

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """A straight line."""
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>')

    def path(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """Straight lines through the points."""
        if len(points) > 1:
            steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            self.parts.append(f'<polyline points="{steps}" class="{css}"/>')

    def text(self, x: float, y: float, content: str, css: str, anchor: str = "start") -> None:
        """Text with its baseline at y."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{escape(css)}" text-anchor="{anchor}">{escape(content)}</text>'
        )

    def axes(self, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x: str, y: str) -> None:
        """Grid lines at y ticks, marks at x ticks (both in pixels), and the names of the axes."""
        left, _, right, bottom = self.plot
        for position, label in y_ticks:
            self.line(left, position, right, position, "grid")
            self.text(left - 8, position + 4, label, "tick", "end")
        for position, label in x_ticks:
            self.line(position, bottom, position, bottom + 4, "axis")
            self.text(position, bottom + 18, label, "tick", "middle")
        self.line(left, bottom, right, bottom, "axis")
        self.text(0, 12, y, "name")
        self.text(right, self.height - 6, x, "name", "end")

    def marker(
        self, x: float, y: float, shape: str, css: str, tip: str, radius: float = 4.5, clear: float = 1.0
    ) -> None:
        """A point that says what it is when pointed at, touched or focused; labels stay ``clear`` of it."""
        # The larger unseen circle is there for fingers.
        hit = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="11" class="hit"/>'
        said = escape(tip)
        opened = f'<g class="mark {css}" tabindex="0" role="img" aria-label="{said}" data-tip="{said}">'
        self.parts.append(f"{opened}{hit}{_shape(x, y, shape, radius)}</g>")
        self.placer.keep_clear(x, y, radius + clear)

    def label(self, x: float, y: float, content: str, css: str) -> None:
        """Text beside a point; left out where there is no room for it."""
        found = self.placer.place(x, y, 6.6 * len(content), 9.0, 7.0)
        if found is not None:
            self.text(*found, content, css)

    def svg(self, css: str = "") -> str:
        """The picture as an ``<svg>`` element."""
        return (
            f'<svg class="chart {css}" viewBox="0 0 {self.width} {self.height}" role="group" '
            f'aria-label="{escape(self.title)}">{"".join(self.parts)}</svg>'
        )


def swatch(shape: str, css: str, line: bool = True) -> str:
    """A legend's sample: a marker, with a piece of its line."""
    drawn = f'<line x1="0" y1="7" x2="26" y2="7" class="line {css}"/>' if line else ""
    drawn += f'<g class="mark {css}">{_shape(13, 7, shape, 4.0)}</g>' if shape else ""
    return f'<svg class="swatch" viewBox="0 0 26 14" aria-hidden="true">{drawn}</svg>'


def _shape(x: float, y: float, shape: str, r: float) -> str:
    if shape == "square":
        return f'<rect x="{x - r * 0.9:.1f}" y="{y - r * 0.9:.1f}" width="{r * 1.8:.1f}" height="{r * 1.8:.1f}"/>'
    if shape == "ring":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" class="ring"/>'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
    return f'<polygon points="{_polygon(x, y, shape, r)}"/>'


def _polygon(x: float, y: float, shape: str, r: float) -> str:
    if shape == "star":
        points = [
            (
                x + (r * 1.6 if i % 2 == 0 else r * 0.7) * math.sin(i * math.pi / 5),
                y - (r * 1.6 if i % 2 == 0 else r * 0.7) * math.cos(i * math.pi / 5),
            )
            for i in range(10)
        ]
    elif shape == "triangle":
        points = [(x, y - r * 1.2), (x + r * 1.15, y + r * 0.85), (x - r * 1.15, y + r * 0.85)]
    else:
        points = [(x, y - r * 1.25), (x + r * 1.25, y), (x, y + r * 1.25), (x - r * 1.25, y)]
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
