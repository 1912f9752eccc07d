"""Lists as arguments of the benchmarks."""

from __future__ import annotations


def numbers(text: str) -> tuple[int, ...]:
    """``"1,2"`` as whole numbers."""
    return tuple(int(part) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    """``"a,b"`` as words."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
