"""The rollout role: `run` samples every unit of work that its policy, the student or the teacher, has in the plan, and
has every version answer the evaluations it is chosen for.

Any number of sidecars may run, join late or die: units are leased, what is asked of the engine for a unit depends on
its identity alone, and a stage whose units are all there is passed over without its weights being needed. The engine
is kept full across units, so one that dies loses as many units as it had begun.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_npd.buffer.listing import is_finished
from megatron_npd.buffer.plan import Stage, sampling_seed
from megatron_npd.buffer.retention import has_room
from megatron_npd.buffer.role_context import RoleContext
from megatron_npd.buffer.shards import Shard, write_shard
from megatron_npd.buffer.work import UnitsInHand, WorkUnit
from megatron_npd.config import Config
from megatron_npd.hardware.device import device_here
from megatron_npd.models.hf_config import eos_token_ids
from megatron_npd.process.activity import doing
from megatron_npd.process.memory import release_unused
from megatron_npd.process.waiting import wait_for
from megatron_npd.roles import SIDECAR, TEACHER
from megatron_npd.rollout.examining import Examiner
from megatron_npd.rollout.given import given_shard
from megatron_npd.rollout.parity import Parity, check_parity
from megatron_npd.rollout.rollout_batch import RolloutBatch
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import TEACHER_VERSION, Event, FinishReason
from megatron_npd.versions.manifest import published_versions, read_parity_probe
from megatron_npd.vllm_engine.engine import Request, RolloutEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sidecar:
    """What the functions below share."""

    context: RoleContext
    stop_ids: list[int]

    @property
    def config(self) -> Config:
        return self.context.config

    @property
    def run(self) -> RunDirectory:
        return self.context.run

    @property
    def one_by_one(self) -> bool:
        """Whether units must not share a batch: on a GPU vLLM has kernels for which it makes no difference."""
        return self.config.deterministic and device_here() == "cpu"

    def undone(self, stage: Stage) -> bool:
        """Whether a unit of the stage is missing."""
        return not is_finished(self.run, "rollouts", stage)

    def has_room(self, stage: Stage) -> bool:
        """Whether the buffer has room for responses of a stage."""
        return has_room(self.run, self.context.plan, stage, int(self.config.buffer.max_gib * 2**30))

    def write(self, unit: WorkUnit, shard: Shard) -> None:
        """Write a unit's shard, with how its prompts were framed."""
        stage = unit.stage
        framings = self.context.prompts[stage.split].framings_of(stage.prompt_index[stage.rows(unit.number)])
        whole = replace(shard, metadata=shard.metadata | {"framings": framings})
        write_shard(self.run.unit("rollouts", stage.name, unit.number), whole)

    def requests_of(self, unit: WorkUnit) -> list[Request]:
        """What to sample for a unit, in its order of identities: a function of those alone."""
        stage, rollout = unit.stage, self.config.rollout
        rows, prompts = stage.rows(unit.number), self.context.prompts[stage.split]
        return [
            Request(
                prompt_ids=prompts[prompt].tolist(),
                seed=sampling_seed(self.config.seed, stage.name, prompt, sample),
                max_new_tokens=rollout.max_new_tokens,
                stop_token_ids=self.stop_ids,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
            )
            for prompt, sample in zip(stage.prompt_index[rows].tolist(), stage.sample_index[rows].tolist(), strict=True)
        ]


@dataclass
class Throughput:
    """What an engine has finished, in the seconds that it worked."""

    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds


def run(config: Config, policy: str) -> None:
    """Generate all that `policy`, `student` or `teacher`, has to generate in this run, then return.

    Raises:
        BadVersionError: a published version must not be used.
        ParityError: the engine's logprobs are not the trainer's.
        RolloutError: the engine failed.
    """
    context = RoleContext(config, SIDECAR[policy])
    context.open_metrics()
    sidecar = Sidecar(context, eos_token_ids(config.models.student))
    if policy == TEACHER:
        _run_teacher(sidecar)
    else:
        _run_student(sidecar)
    logger.info("nothing is left to sample for the %s", policy)


def _run_teacher(sidecar: Sidecar) -> None:
    stages = [stage for stage in sidecar.context.plan.teacher_stages if sidecar.undone(stage)]
    write_given(sidecar, stages)
    if not any(sidecar.undone(stage) for stage in stages):
        return
    generate(sidecar, _start_engine(sidecar, Path(sidecar.config.models.teacher), TEACHER_VERSION), stages)


def _run_student(sidecar: Sidecar) -> None:
    """Version by version: first the round that the trainer waits for, then what is to be answered."""
    examiner = Examiner(sidecar.context, sidecar.stop_ids)
    engine = None
    while True:
        for version in sorted({*sidecar.context.plan.round_versions, *(exam.version for exam in examiner.left())}):
            engine = _serve_version(sidecar, examiner, engine, version)
        left = examiner.left()
        ahead = [exam for exam in left if engine is None or exam.version >= engine.version]
        if not ahead:
            if left:  # who was at it is at it still, or has died; and an engine only moves on
                logger.info("%s is left to others, or to a sidecar that is started anew", left[0])
            return
        examiner.wait_for_others(ahead)


def _serve_version(
    sidecar: Sidecar, examiner: Examiner, engine: RolloutEngine | None, version: int
) -> RolloutEngine | None:
    """All that is to be done with a version and that nobody else does; the engine, once there is one.

    What comes back of an older version than it serves (a corrupt shard) is left: an engine only moves on.
    """
    if engine and engine.version > version:
        return engine
    for stage in (stage for stage in sidecar.context.plan.round_stages if stage.version == version):
        if not sidecar.undone(stage):
            logger.info("%s is complete already", stage.name)
            continue
        write_given(sidecar, [stage])
        if not sidecar.undone(stage):  # a given unit was all that was missing, so no engine is
            continue
        engine = engine or _start_on_published(sidecar, version)
        _reach_version(sidecar, engine, version)
        generate(sidecar, engine, [stage])
    if examiner.wants(version):
        engine = engine or _start_on_published(sidecar, version)
        _reach_version(sidecar, engine, version)
        examiner.examine(engine)
    return engine


def _start_on_published(sidecar: Sidecar, wanted: int) -> RolloutEngine:
    """An engine on version `wanted`, or on the newest before it, so that it has started when `wanted` appears."""

    def newest() -> int | None:
        return max((v for v in published_versions(sidecar.run) if v <= wanted), default=None)

    version = wait_for("the first published policy version", newest, sidecar.config.launch.poll_seconds)
    return _start_engine(sidecar, sidecar.run.version(version), version)


def _start_engine(sidecar: Sidecar, folder: Path, version: int) -> RolloutEngine:
    config, since = sidecar.config, time.monotonic()
    longest, models = config.longest_sequence, config.models
    with doing("starting an engine on " + ("the teacher" if version == TEACHER_VERSION else f"version {version}")):
        engine = RolloutEngine(folder, version, config.rollout, models.dtype, longest, models.trust_remote_code)
        parity = None if version == TEACHER_VERSION else check_parity(engine, read_parity_probe(folder), config.rollout)
    seconds = time.monotonic() - since
    _report(sidecar, Event.START, engine, parity, seconds, import_seconds=sidecar.context.import_seconds)
    return engine


def _reach_version(sidecar: Sidecar, engine: RolloutEngine, wanted: int) -> None:
    """Wait for version `wanted` and serve it. It is read and verified before this role takes its turn."""
    if engine.version == wanted:
        return
    folder = sidecar.run.version(wanted)
    wait_for(f"policy version {wanted}", lambda: folder.is_dir() or None, sidecar.config.launch.poll_seconds)
    with doing(f"moving to version {wanted}"), engine.stage(folder, wanted) as staged, sidecar.context.turn():
        since = time.monotonic()
        engine.refresh(staged)
        parity = check_parity(engine, staged.probe, sidecar.config.rollout)
        stall = time.monotonic() - since
        figures = {"bytes": staged.copy.weight_bytes, "verify_seconds": staged.seconds, "stall_seconds": stall}
    _report(sidecar, Event.REFRESH, engine, parity, stall, **figures)


def write_given(sidecar: Sidecar, stages: list[Stage]) -> None:
    """Write the units of given responses that nobody else writes: at once, before an engine starts."""
    hand = UnitsInHand(
        sidecar.run, sidecar.config, "rollouts", stages, sidecar.has_room, wanted=lambda unit: unit.is_given
    )
    with hand:
        while unit := hand.take():
            _write_given_unit(sidecar, unit, hand)


def _write_given_unit(sidecar: Sidecar, unit: WorkUnit, hand: UnitsInHand) -> None:
    since = time.monotonic()
    shard = given_shard(unit, sidecar.context.prompts[unit.stage.split], sidecar.config.seed)
    sidecar.write(unit, shard)
    hand.give_back(unit)
    logger.info("%s: %d given responses, %.1f s", unit, len(shard), time.monotonic() - since)


def generate(sidecar: Sidecar, engine: RolloutEngine, stages: list[Stage]) -> None:
    """Generate the units of these stages, all by the version that is served, that nobody else does."""
    batch, throughput = RolloutBatch(engine, sidecar.requests_of, sidecar.one_by_one), Throughput()
    with UnitsInHand(sidecar.run, sidecar.config, "rollouts", stages, sidecar.has_room) as hand:
        while True:
            _top_up(sidecar, batch, hand)
            if batch.units:
                _finish_a_unit(sidecar, batch, hand, throughput)
            elif stage := hand.next_stage():
                _wait_for_room(sidecar, stage)
                hand.wait_for_others(stage)
            else:
                return


def _top_up(sidecar: Sidecar, batch: RolloutBatch, hand: UnitsInHand) -> None:
    """Begin one more unit, if the engine has room. One at a time: sidecars that begin together share a stage.

    A unit of given responses is here only because a worker that was writing it is gone.
    """
    if batch.has_room and (unit := hand.take()):
        if unit.is_given:
            _write_given_unit(sidecar, unit, hand)
        else:
            batch.begin(unit)


def _finish_a_unit(sidecar: Sidecar, batch: RolloutBatch, hand: UnitsInHand, throughput: Throughput) -> None:
    """Run the engine, and keep it full, until a unit is finished, or several are in the same step; write them."""
    with doing(f"generating {batch}"), sidecar.context.turn():
        since = time.monotonic()
        while not (finished := batch.step()):
            _top_up(sidecar, batch, hand)
        for unit, shard in finished:
            sidecar.write(unit, shard)
        seconds = time.monotonic() - since
    tokens = [len(shard["response_ids"]) for _, shard in finished]
    throughput.add(sum(tokens), seconds)
    for (unit, shard), share in zip(finished, tokens, strict=True):
        hand.give_back(unit)
        _report_unit(sidecar, unit, shard, seconds * share / sum(tokens), throughput)
    release_unused()
    sidecar.context.log(Event.MEMORY, **sidecar.context.memory.record())


def _wait_for_room(sidecar: Sidecar, stage: Stage) -> None:
    """Stay behind while the buffer is full and the trainer still has earlier stages to use up."""
    if not sidecar.has_room(stage):
        what = f"the shards to take less than buffer.max_gib = {sidecar.config.buffer.max_gib}"
        wait_for(what, lambda: sidecar.has_room(stage) or None, sidecar.config.launch.poll_seconds)


def _report(
    sidecar: Sidecar, event: Event, engine: RolloutEngine, parity: Parity | None, seconds: float, **figures: float
) -> None:
    """Log and record that the engine serves a version, `event` START or REFRESH."""
    if parity:
        figures |= {"parity_mean": parity.mean, "parity_max": parity.max}
    sidecar.context.log(event, version=engine.version, seconds=seconds, **figures)
    served = "the teacher" if engine.version == TEACHER_VERSION else f"version {engine.version}"
    agreement = (
        f"; differs from the trainer by {parity.mean:.2g} nats a token, at most {parity.max:.2g}" if parity else ""
    )
    logger.info("serving %s after %.1f s%s", served, seconds, agreement)


def _report_unit(sidecar: Sidecar, unit: WorkUnit, shard: Shard, seconds: float, throughput: Throughput) -> None:
    """`seconds`: of the engine's work since it last finished a unit, or this unit's share of them."""
    samples, tokens = len(shard), len(shard["response_ids"])
    finished = float(np.mean(shard["finish_reason"] == FinishReason.STOP))
    sidecar.context.log(
        Event.UNIT,
        stage=unit.stage.name,
        unit=unit.number,
        samples=samples,
        prompt_tokens=len(shard["prompt_ids"]),
        response_tokens=tokens,
        seconds=seconds,
        tokens_per_second=throughput.per_second,
        mean_response_length=tokens / samples,
        finished_share=finished,
    )
    logger.info(
        "%s: %d responses, %d tokens, %.0f%% finished; %.0f tokens/s so far",
        unit, samples, tokens, 100 * finished, throughput.per_second,
    )  # fmt: skip
