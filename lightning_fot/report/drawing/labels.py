"""Find room for labels beside points: greedy, and rather no label than one on top of another."""

from __future__ import annotations

from dataclasses import dataclass, field

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; y grows downwards."""


@dataclass
class Placer:
    """What is taken in a plot.

    Args:
        bounds: Where labels may be.
        taken: What they must not touch.
    """

    bounds: Box
    taken: list[Box] = field(default_factory=list)

    def keep_clear(self, x: float, y: float, reach: float) -> None:
        """No label within ``reach`` of a point."""
        self.taken.append((x - reach, y - reach, x + reach, y + reach))

    def place(self, x: float, y: float, width: float, height: float, gap: float) -> tuple[float, float] | None:
        """Left end of the baseline for a label of this size beside a point, and the room is taken; None without room.

        Args:
            x: The point.
            y: The point.
            width: Of the label.
            height: Of its capitals.
            gap: About how far from the point.
        """
        near, far = gap, gap * 1.4
        beside, above, below = y - near / 2, y - far, y + (near + height) / 2
        for left, baseline in (
            (x + near, beside), (x + far, above), (x - near - width, beside), (x - far - width, above),
            (x - width / 2, above), (x - width / 2, y + near + height), (x + near, below), (x - near - width, below),
        ):  # fmt: skip
            box = (left, baseline - height, left + width, baseline + height * 0.25)
            inside = (
                box[0] >= self.bounds[0]
                and box[1] >= self.bounds[1]
                and box[2] <= self.bounds[2]
                and box[3] <= self.bounds[3]
            )
            if inside and not any(_overlap(box, other) for other in self.taken):
                self.taken.append(box)
                return left, baseline
        return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
