"""When what happens: the learning rate, and how an epoch's samples become optimizer steps. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_npd.buffer.plan import generator, training_order
from megatron_npd.data.packing import pack


@dataclass(frozen=True)
class Step:
    """One optimizer step: packs (lists of sample indices) of the global batch, and how far the stage is after it."""

    packs: list[list[int]]
    epoch: int
    progress: float
    """Fraction of the stage's steps done once this step is done, in (0, 1]."""


def learning_rate(progress: float, peak: float, floor: float, warmup_fraction: float) -> float:
    """Linear rise to `peak`, then a cosine to `floor`; `progress` in (0, 1].

    A function of progress, not of a step count, because how many samples a round keeps is not known beforehand.
    """
    if progress < warmup_fraction:
        return peak * progress / warmup_fraction
    decayed = (progress - warmup_fraction) / (1.0 - warmup_fraction)
    return floor + 0.5 * (peak - floor) * (1.0 + math.cos(math.pi * decayed))


def plan_steps(
    run_seed: int,
    stage: str,
    identities: np.ndarray,
    lengths: np.ndarray,
    *,
    epochs: int,
    capacity: int,
    global_batch_size: int,
) -> list[Step]:
    """Every optimizer step of a stage: a pure function of seed, stage and the kept samples.

    An epoch's samples are shuffled, packed, and the packs shuffled again, because packing sorts by length. They are
    dealt out evenly over as few steps of at most `global_batch_size` packs as they need.

    Args:
        identities: int64 [n, 2] (prompt_index, sample_index). lengths: positions each sample takes, [n].
    """
    steps: list[tuple[int, list[list[int]]]] = []
    for epoch in range(epochs):
        order = training_order(run_seed, stage, epoch, identities)
        packs = [[int(order[item]) for item in items] for items in pack(lengths[order], capacity)]
        shuffled = generator(run_seed, "packs", stage, epoch).permutation(len(packs))
        for group in np.array_split(shuffled, -(-len(packs) // global_batch_size)):
            steps.append((epoch, [packs[number] for number in group]))
    return [Step(packs, epoch, (done + 1) / len(steps)) for done, (epoch, packs) in enumerate(steps)]


def share_of_rank(packs: list[list[int]], rank: int, size: int) -> Iterator[list[int]]:
    """The packs one data-parallel rank computes; every rank gets the same number, filled up with empty packs."""
    for start in range(0, len(packs), size):
        yield packs[start + rank] if start + rank < len(packs) else []
