"""Means with 95 % intervals over prompt sets, and differences paired by prompt set."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_npd.tasks import intervals

T_975 = [math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
"""Student's t, 97.5 %, by degrees of freedom, as tables have it."""


@dataclass(frozen=True)
class Mean:
    """A mean and half the width of its 95 % interval, over `count` prompt sets; infinite for a single one."""

    value: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        return self.value - self.half_width

    @property
    def high(self) -> float:
        return self.value + self.half_width

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.half_width:.1f}" if math.isfinite(self.half_width) else f"{self.value:.1f}"

    def signed(self) -> str:
        return f"{self.value:+.1f} ± {self.half_width:.1f}" if math.isfinite(self.half_width) else f"{self.value:+.1f}"


def mean_of(values: Sequence[float]) -> Mean:
    """t-interval of the mean of independent values."""
    count = len(values)
    if count < 2:
        return Mean(values[0], math.inf, count)
    return Mean(statistics.fmean(values), T_975[count - 1] * statistics.stdev(values) / math.sqrt(count), count)


def wilson(correct: int, asked: int) -> tuple[float, float]:
    """95 % Wilson interval of one run's accuracy, in percent: how exactly so few problems tell it."""
    low, high = intervals.wilson(correct, asked)
    return 100.0 * low, 100.0 * high


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Mean | None:
    """Mean difference over the prompt sets that both have; None: there is none."""
    both = sorted(ours.keys() & theirs.keys())
    return mean_of([ours[number] - theirs[number] for number in both]) if both else None
