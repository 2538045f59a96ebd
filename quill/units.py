"""Counts, sizes and durations in a form for people."""

from __future__ import annotations

import math
from collections.abc import Sequence


def size(bytes: float | None) -> str:
    """Write a number of bytes in powers of 1000: "9.7 MB", "12 kB"; empty for None."""
    return "" if bytes is None else _scale(bytes, ("B", "kB", "MB", "GB", "TB"), " ", whole_from=9.95)


def count(number: float | None) -> str:
    """Write a number of parameters or tokens: "4.8M"; empty for None."""
    return "" if number is None else _scale(number, ("", "k", "M", "B", "T"), "", whole_from=99.5)


def duration(seconds: float | None) -> str:
    """Write a number of seconds: "4.2s", "3m 20s", "2h 05m", "3d 4h"; empty for None and infinity."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    if seconds < 59.5:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours < 48 else f"{hours // 24}d {hours % 24}h"


def plural(number: object, noun: str) -> str:
    """Write a number and its noun: "1 layer", "1,000 layers"; anything but an integer is kept as it is."""
    shown = f"{number:,}" if isinstance(number, int) else number
    return f"{shown} {noun}" + ("" if number == 1 else "s")


def _scale(value: float, units: Sequence[str], space: str, whole_from: float) -> str:
    step = 0
    # The format below rounds 999.5 up to four digits.
    while abs(value) >= 999.5 and step < len(units) - 1:
        value /= 1000
        step += 1
    digits = 0 if step == 0 or abs(value) >= whole_from else 1
    return f"{value:.{digits}f}{space}{units[step]}"
