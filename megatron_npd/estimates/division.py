"""How to divide GPUs among the roles so that none starves: try divisions in the simulation, take the fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_npd.config import Config
from megatron_npd.estimates.rates import Rates
from megatron_npd.estimates.simulation import Timeline, Workers, simulate
from megatron_npd.estimates.workload import Workload


@dataclass(frozen=True)
class Sizes:
    """GPUs of one worker."""

    replica: int
    annotator: int
    sidecar: int

    @staticmethod
    def of(config: Config) -> Sizes:
        """Those of a configuration."""
        training = config.training
        return Sizes(
            training.world_size // training.data_parallel_size,
            config.annotator.tensor_model_parallel_size,
            config.rollout.tensor_model_parallel_size,
        )

    def gpus(self, workers: Workers) -> int:
        """What so many workers take."""
        return (
            workers.replicas * self.replica
            + workers.annotators * self.annotator
            + (workers.sidecars + workers.teacher_sidecars) * self.sidecar
        )


@dataclass(frozen=True)
class Division:
    """Workers that fit on some GPUs, and what becomes of the run with them."""

    workers: Workers
    timeline: Timeline


def best_division(work: Workload, rates: Rates, sizes: Sizes, gpus: int) -> Division | None:
    """The fastest division of at most so many GPUs; of those within 1 % of it, the one that takes the fewest.

    Replicas divide the global batch, as `training.data_parallel_size` must. None: not even one worker of each fits.
    """
    tried = [Division(workers, simulate(work, rates, workers)) for workers in divisions(work, sizes, gpus)]
    if not tried:
        return None
    fastest = min(division.timeline.seconds for division in tried)
    good = (division for division in tried if division.timeline.seconds <= 1.01 * fastest)
    return min(good, key=lambda division: (sizes.gpus(division.workers), division.timeline.seconds))


def divisions(work: Workload, sizes: Sizes, gpus: int) -> Iterator[Workers]:
    """What is worth trying: every number of replicas; numbers of annotators a fifth apart; the rest sidecars."""
    units = max(len(stage.units) for stage in work.stages)
    for replicas in range(1, work.packs_at_once + 1):
        left = gpus - replicas * sizes.replica
        if work.packs_at_once % replicas or left < sizes.annotator + sizes.sidecar:
            continue
        annotators = 1
        while annotators <= units and annotators * sizes.annotator + sizes.sidecar <= left:
            sidecars = (left - annotators * sizes.annotator) // sizes.sidecar
            for several in {min(sidecars, units), min(max(sidecars // 2, 1), units)}:
                yield Workers(replicas, annotators, several)
            annotators = max(annotators + 1, annotators * 6 // 5)
