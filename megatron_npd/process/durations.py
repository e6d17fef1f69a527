"""Spans of time in words, the same wherever this package says one."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """A span of time as people say it: 8 s, 3 min 20 s, 2 h 5 min, 4 d 1 h."""
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = int(seconds % size // smaller_size)
            return f"{int(seconds // size)} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds:.0f} s"
