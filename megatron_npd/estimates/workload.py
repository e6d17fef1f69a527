"""What a run has to do, in the units that take time: tokens to sample, tokens to prefill, steps to train."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_npd.buffer.plan import Plan, Stage, epochs_of, given_of, publishing_step
from megatron_npd.config import Config
from megatron_npd.estimates.rates import Rates
from megatron_npd.run_directory import HELDOUT_STAGE, WARMUP_STAGE
from megatron_npd.schema import TEACHER_VERSION

PACKING_EFFICIENCY = 0.98
"""Share of a pack's positions that best fit fills, but for the last of an epoch (`data.packing`, measured)."""


@dataclass(frozen=True)
class StageWork:
    """One stage."""

    name: str
    version: int
    """Policy version that generates it, or TEACHER_VERSION."""
    units: list[int]
    """Responses of each unit."""
    prefilled_tokens: float
    """Tokens the annotators prefill for one response; 0: the stage is not annotated."""
    packs_of_steps: list[int]
    """Packs of each optimizer step; empty: the stage is not trained on."""
    publish_after: int = 0
    """Step (1-based) after which `publishes` is published."""
    publishes: int = 0
    given_units: int = 0
    """Of the units, so many at the end are given responses, which nobody samples."""

    @property
    def is_teachers(self) -> bool:
        return self.version == TEACHER_VERSION


@dataclass(frozen=True)
class Workload:
    """A whole run."""

    stages: list[StageWork]
    final_version: int
    evaluated: frozenset[int]
    """Versions whose held-out figures are wanted."""
    response_tokens: float
    """Of one response."""
    heldout_tokens: float
    """Tokens of the held-out set: the student prefills them for each of these versions, a teacher once."""
    tokens_per_pack: int
    packs_at_once: int
    """Largest number of data-parallel replicas that all have work: packs of a full step."""


def workload(config: Config, plan: Plan, rates: Rates) -> Workload:
    """The work of a run from samples as `rates.samples` says they are."""
    samples = rates.samples
    whole = samples.prompt_tokens + samples.response_tokens
    heldout = len(plan.stages[HELDOUT_STAGE].prompt_index)
    return Workload(
        stages=[_stage(config, plan, rates, stage) for stage in plan.stages.values()],
        final_version=plan.final_version,
        evaluated=plan.evaluated,
        response_tokens=samples.response_tokens,
        heldout_tokens=heldout * whole,
        tokens_per_pack=config.training.sequence_length,
        packs_at_once=config.training.global_batch_size,
    )


def _stage(config: Config, plan: Plan, rates: Rates, stage: Stage) -> StageWork:
    rows = (stage.rows(unit) for unit in range(stage.units))
    units = [row.stop - row.start for row in rows]
    if stage.name == HELDOUT_STAGE:
        return StageWork(stage.name, stage.version, units, 0.0, [], given_units=stage.units - stage.own_units)
    samples = rates.samples
    by_teacher = stage.name == WARMUP_STAGE
    conditional = samples.prompt_tokens + samples.response_tokens
    kept = stage.own * (samples.warmup_kept_share if by_teacher else samples.kept_share)
    kept += stage.given if by_teacher else min(stage.given, given_of(config.rounds.given_share, round(kept)))
    steps = packs_of_steps(config, stage.name, kept * samples.kept_tokens)
    return StageWork(
        stage.name,
        stage.version,
        units,
        # A student's response is scored by the teacher with the prompt, and by both models without it.
        (samples.warmup_prefilled_tokens or conditional)
        if by_teacher
        else (samples.prefilled_tokens or conditional + 2 * samples.response_tokens),
        steps,
        publishing_step(config, plan, stage, len(steps)),
        stage.publishes,
        stage.units - stage.own_units,
    )


def packs_of_steps(config: Config, stage: str, tokens: float) -> list[int]:
    """Packs of every step of a stage with so many kept tokens, as `training.schedule.plan_steps` splits them."""
    training = config.training
    packs = max(1, math.ceil(tokens / (training.sequence_length * PACKING_EFFICIENCY)))
    steps = math.ceil(packs / training.global_batch_size)
    epoch = [packs // steps + (step < packs % steps) for step in range(steps)]
    return epoch * epochs_of(config, stage)
