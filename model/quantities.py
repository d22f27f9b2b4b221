"""Numbers with units, for tables and sentences: three significant figures, no exponents."""

from __future__ import annotations

import math
from collections.abc import Sequence

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"))


def _prefix(value: float) -> tuple[float, str]:
    return next(((scale, prefix) for scale, prefix in PREFIXES if value >= scale), (1.0, ""))


def figures(value: float, digits: int = 3) -> str:
    """At least so many significant figures, all of those before the point, and no exponent."""
    after = max(0, digits - 1 - math.floor(math.log10(value))) if value else 0
    return f"{value:,.{after}f}"


def quantity(value: float, unit: str = "", digits: int = 3) -> str:
    """1_500_000 -> "1.50 M"; nothing for 0."""
    if not value:
        return ""
    scale, prefix = _prefix(value)
    return f"{figures(value / scale, digits if scale > 1 else 1)} {prefix}{unit}".rstrip()


def duration(seconds: float | None) -> str:
    """0.0021 -> "2.10 ms"; nothing for 0 and None."""
    if not seconds:
        return ""
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.2f} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.1f} us"
    )


def in_unit(name: str, values: Sequence[float], unit: str, largest: float | None = None) -> tuple[str, list[str]]:
    """A column's head and cells in one unit, in which the largest has up to four figures before the point.

    >>> in_unit("forward", [755e9, 0, 2.01e12], "FLOP")
    ('forward, GFLOP', ['755', '', '2,010'])
    """
    scale, prefix = _prefix((largest or max(values)) / 10)
    head = f"{name}, {prefix}{unit}" if prefix or unit else name
    return head, [figures(value / scale) if value else "" for value in values]
