"""How sure an accuracy is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Z_95 = 1.959963984540054
"""The normal distribution has 95 % of its mass within so many standard deviations."""


def wilson(correct: float, count: float, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of a share (E. B. Wilson, JASA 22, 1927): low and high end, within [0, 1].

    Of `count` independent trials `correct` succeeded; neither need be whole. The interval is never empty, also where
    all or none succeeded. Without a trial it is all of [0, 1].
    """
    if not count:
        return 0.0, 1.0
    share, spread = correct / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    # The share lies within, also where rounding says otherwise.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def in_words(result: Mapping[str, Any]) -> str:
    """Figures of an evaluation for people: `412/500 = 82.4 % (95 % Wilson 78.8 to 85.5)`."""
    low, high = (100 * end for end in result["wilson_95"])
    share = f"{result['correct']}/{result['samples']} = {100 * result['accuracy']:.1f} %"
    return f"{share} (95 % Wilson {low:.1f} to {high:.1f})"
