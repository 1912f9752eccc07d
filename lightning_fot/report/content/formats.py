"""Write numbers for people: the same rounding in the page, on the terminal and in the figures."""

from __future__ import annotations

import math

MISSING = "–"


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with thousands separators and so many decimals."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def significant(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, never in exponent form.

    Example:
        >>> significant(0.012345), significant(123.45), significant(98765.0)
        ('0.0123', '123', '98,765')
    """
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    # 99.97 to three digits is 100, which needs one decimal less.
    decimals = digits - 1 - math.floor(math.log10(abs(round(value, decimals))))
    if decimals > 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, decimals)}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage; never rounded up to 100 % or down to 0 % when it is not."""
    if value is None:
        return MISSING
    scaled = 100 * value
    limit = 10.0**-digits
    if 100 - limit / 2 <= scaled < 100:
        return f">{100 - limit:.{digits}f}%"
    if 0 < scaled < limit / 2:
        return f"<{limit:.{digits}f}%"
    if scaled in (0, 100):
        return f"{scaled:.0f}%"
    return f"{scaled:.{digits}f}%"


def change(value: float, error: float | None) -> str:
    """A relative change with its sign, such as ``−3.1% ± 0.4``."""
    shown = f"{100 * value:+.1f}%".replace("-", "−")
    return shown if error is None else f"{shown} ± {100 * error:.1f}"


def times(value: float | None) -> str:
    """A ratio such as ``3.2×``."""
    return MISSING if value is None else f"{significant(value, 2 if value < 100 else 3)}×"


def size(value: float | None) -> str:
    """Bytes with a decimal unit (1 MB = 10⁶ bytes).

    Example:
        >>> size(12_345_678)
        '12.3 MB'
    """
    if value is None:
        return MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.{1 if value < 100 * scale else 0}f} {unit}"
    return f"{value:.0f} B"


def tokens(value: float | None) -> str:
    """A number of tokens with separators."""
    return MISSING if value is None else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds."""
    if seconds < 100:
        return f"{significant(seconds, 2 if seconds < 10 else 3)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def brief(seconds: float | None) -> str:
    """A short time with its unit.

    Example:
        >>> brief(0.0123), brief(2.5), brief(3e-7)
        ('12 ms', '2.5 s', '<0.01 ms')
    """
    if seconds is None:
        return MISSING
    if seconds == 0:
        return "0"
    if seconds < 1e-5:
        return "<0.01 ms"
    return (
        f"{significant(1e3 * seconds, 2)} ms" if seconds < 1 else f"{significant(seconds, 2 if seconds < 10 else 3)} s"
    )


def long(seconds: float | None) -> str:
    """A time that may be of days.

    Example:
        >>> long(90.0), long(7200.0), long(3e6)
        ('90 s', '2.0 h', '35 days')
    """
    if seconds is None or seconds < 600:
        return brief(seconds)
    hours = seconds / 3600
    return f"{significant(hours, 2)} h" if hours < 48 else f"{significant(hours / 24, 2)} days"


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """95 % interval of a rate after so few trials (Wilson 1927).

    Example:
        >>> low, high = wilson_interval(0, 3)
        >>> round(low, 2), round(high, 2)
        (0.0, 0.56)
    """
    z = 1.959964
    rate = successes / trials
    middle = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    norm = 1 + z * z / trials
    return max(0.0, (middle - spread) / norm), min(1.0, (middle + spread) / norm)
