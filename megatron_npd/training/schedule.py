"""When what happens: the learning rate, an epoch's optimizer steps, a step's micro-batches. Pure functions."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_npd.buffer.plan import Plan, Stage, generator, training_order
from megatron_npd.config import Config
from megatron_npd.data.batch import aligned
from megatron_npd.data.packing import pack_balanced
from megatron_npd.models.cost import CostModel
from megatron_npd.run_directory import WARMUP_STAGE


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


def learning_rate_of(config: Config, plan: Plan, stage: Stage, step: Step) -> float:
    """The learning rate of a step: one cosine over the warm-up, another over all rounds together."""
    training, warmup = config.training, config.warmup
    if stage.name == WARMUP_STAGE:
        return learning_rate(step.progress, warmup.lr, warmup.lr / 10, training.lr_warmup_fraction)
    index = stage.version - plan.first_round_version
    progress = (index + step.progress) / config.rounds.count
    return learning_rate(progress, training.lr, training.min_lr, training.lr_warmup_fraction)


def plan_steps(
    run_seed: int,
    stage: str,
    identities: np.ndarray,
    lengths: np.ndarray,
    *,
    epochs: int,
    capacity: int,
    global_batch_size: int,
    alignment: int = 1,
    cost: CostModel,
) -> list[Step]:
    """Every optimizer step of a stage: a pure function of seed, stage, the kept samples and the keyword arguments.

    An epoch's samples are shuffled, packed, and the packs shuffled again, because packing sorts by cost. They are
    dealt out evenly over as few steps of at most `global_batch_size` packs as they need. Samples of equal length are
    told apart by their place in the shuffled order of identities, so the order they arrived in does not show.

    Args:
        identities: int64 [n, 2] (prompt_index, sample_index).
        lengths: int64 [n], positions of each sample without alignment.
        alignment: a sample takes the next multiple of this many positions; `capacity` is one, too.
        cost: what a sequence costs, by its aligned length.
    """
    assert capacity % alignment == 0, f"capacity {capacity} is no multiple of {alignment}"
    taken = aligned(lengths, alignment)
    steps: list[tuple[int, list[list[int]]]] = []
    for epoch in range(epochs):
        order = training_order(run_seed, stage, epoch, identities)
        packed = pack_balanced(taken[order], capacity, cost.of(taken[order]))
        packs = [[int(order[item]) for item in items] for items in packed]
        shuffled = generator(run_seed, "packs", stage, epoch).permutation(len(packs))
        for group in np.array_split(shuffled, -(-len(packs) // global_batch_size)):
            steps.append((epoch, [packs[number] for number in group]))
    return [Step(packs, epoch, (done + 1) / len(steps)) for done, (epoch, packs) in enumerate(steps)]


def deal(packs: list[list[int]], costs: Sequence[float], ranks: int, multiple_of: int = 1) -> list[list[list[int]]]:
    """Micro-batches of every data-parallel rank: near-equal summed cost, the same number for all.

    Dearest pack first, each goes to the rank with the least cost that may still take one. Ranks are filled up with
    empty packs to the least number that holds all packs and is a multiple of `multiple_of`.

    A rank's micro-batches stay in the order of falling cost. So pipeline stages, which wait for the slowest micro-batch
    in flight, have ones of similar cost in flight, and the cheapest while the pipeline drains; and memory peaks in the
    first micro-batch, not somewhere in the middle of the step.

    Args:
        packs: of one optimizer step.
        costs: of each pack, not negative; an empty pack counts as 0. All micro-batches have the same number of
            positions, so the part of the costs that ranks really differ in is that of attention.
        multiple_of: interleaved pipelining needs multiples of the pipeline's size.

    Returns:
        `ranks` lists of packs; every pack is in exactly one. Deterministic, ties by index.
    """
    assert len(packs) == len(costs), f"{len(packs)} packs, {len(costs)} costs"
    each = -(-len(packs) // (ranks * multiple_of)) * multiple_of
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    cheapest = [(0.0, 0, rank) for rank in range(ranks)]  # heap of (cost, packs, rank) of ranks that may take more
    for number in sorted(range(len(packs)), key=lambda number: -costs[number]):
        spent, count, rank = heapq.heappop(cheapest)
        shares[rank].append(packs[number])
        if count + 1 < each:
            heapq.heappush(cheapest, (spent + costs[number], count + 1, rank))
    return [share + [[] for _ in range(each - len(share))] for share in shares]


@dataclass(frozen=True)
class PackCosts:
    """What packs of a stage's samples cost, in floating-point operations.

    Every pack has `capacity` positions; a sample takes a multiple of `alignment` of them.
    """

    model: CostModel
    lengths: np.ndarray
    """int64 [n], positions of each sample without alignment."""
    capacity: int
    alignment: int

    def attention(self, items: list[int]) -> float:
        """What a pack costs more than an empty one."""
        lengths = aligned(self.lengths[items], self.alignment).astype(float)
        return float(self.model.attention * (lengths**2).sum())

    def of_rank(self, share: list[list[int]]) -> float:
        """All packs of one rank."""
        linear = self.model.linear * self.capacity
        return sum(linear + self.attention(items) for items in share)

    def useful(self, items: list[int]) -> float:
        """Of the samples' own positions alone."""
        return float(self.model.of(self.lengths[items]).sum())


def imbalance(costs_per_rank: Sequence[float]) -> float:
    """Largest over mean cost: 1.0 is perfect; at 1.2 a step takes a fifth longer than if all costs were equal."""
    mean = sum(costs_per_rank) / len(costs_per_rank)
    return max(costs_per_rank) / mean if mean else 1.0
