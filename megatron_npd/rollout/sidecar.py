"""The rollout role: `run` samples every unit of work that its policy, the student or the teacher, has in the plan.

Any number of sidecars may run, join late or die: units are leased, a unit's content depends on its identity alone,
and a stage whose units are all there is passed over without its weights being needed.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_npd.buffer.listing import is_finished
from megatron_npd.buffer.plan import Stage, sampling_seed
from megatron_npd.buffer.retention import has_room
from megatron_npd.buffer.role_context import RoleContext
from megatron_npd.buffer.shards import Shard, concatenate_ragged, write_shard
from megatron_npd.buffer.work import take_units
from megatron_npd.config import Config
from megatron_npd.models.hf_config import eos_token_ids
from megatron_npd.process.activity import doing
from megatron_npd.process.memory import release_unused
from megatron_npd.process.waiting import wait_for
from megatron_npd.roles import SIDECAR, TEACHER
from megatron_npd.rollout.parity import Parity, check_parity
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import ROLLOUT_COLUMNS, TEACHER_VERSION, Event, FinishReason
from megatron_npd.versions.manifest import published_versions, read_parity_probe
from megatron_npd.vllm_engine.engine import Request, Response, RolloutEngine

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

    def undone(self, stage: Stage) -> bool:
        """Whether a unit of the stage is missing."""
        return not is_finished(self.run, "rollouts", stage)


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
    logger.info("every %s response of this run is there", policy)


def _run_teacher(sidecar: Sidecar) -> None:
    stages = [stage for stage in sidecar.context.plan.teacher_stages if sidecar.undone(stage)]
    if not stages:
        return
    engine = _start_engine(sidecar, Path(sidecar.config.models.teacher), TEACHER_VERSION)
    for stage in stages:
        _generate_stage(sidecar, engine, stage)


def _run_student(sidecar: Sidecar) -> None:
    engine = None
    for stage in sidecar.context.plan.round_stages:
        if not sidecar.undone(stage):
            logger.info("%s is complete already", stage.name)
            continue
        engine = engine or _start_on_published(sidecar, stage.version)
        _reach_version(sidecar, engine, stage.version)
        _generate_stage(sidecar, engine, stage)


def _start_on_published(sidecar: Sidecar, wanted: int) -> RolloutEngine:
    """An engine on version `wanted`, or on the newest before it, so that it has started when `wanted` appears."""

    def newest() -> int | None:
        return max((v for v in published_versions(sidecar.run) if v <= wanted), default=None)

    version = wait_for("the first published policy version", newest, sidecar.config.launch.poll_seconds)
    return _start_engine(sidecar, sidecar.run.version(version), version)


def _start_engine(sidecar: Sidecar, folder: Path, version: int) -> RolloutEngine:
    config, since = sidecar.config, time.monotonic()
    longest = config.prompts.max_prompt_tokens + config.rollout.max_new_tokens
    models = config.models
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


def _generate_stage(sidecar: Sidecar, engine: RolloutEngine, stage: Stage) -> None:
    """Generate the units of a stage that nobody else does."""
    for unit in take_units(sidecar.run, sidecar.config, "rollouts", stage):
        _wait_for_room(sidecar, stage)
        with doing(f"generating {stage.name}, unit {unit + 1} of {stage.units}"), sidecar.context.turn():
            since = time.monotonic()
            shard = _generate_unit(sidecar, engine, stage, unit)
            write_shard(sidecar.run.unit("rollouts", stage.name, unit), shard)
        _report_unit(sidecar, stage, shard, unit, time.monotonic() - since)
        release_unused()
        sidecar.context.log(Event.MEMORY, **sidecar.context.memory.record())


def _wait_for_room(sidecar: Sidecar, stage: Stage) -> None:
    """Stay behind while the buffer is full and the trainer still has earlier stages to use up."""
    gib = sidecar.config.buffer.max_gib

    def look() -> bool | None:
        return has_room(sidecar.run, sidecar.context.plan, stage, int(gib * 2**30)) or None

    if not look():
        wait_for(f"the shards to take less than buffer.max_gib = {gib}", look, sidecar.config.launch.poll_seconds)


def _generate_unit(sidecar: Sidecar, engine: RolloutEngine, stage: Stage, unit: int) -> Shard:
    rows, prompts, rollout = stage.rows(unit), sidecar.context.prompts[stage.split], sidecar.config.rollout
    identities = list(zip(stage.prompt_index[rows].tolist(), stage.sample_index[rows].tolist(), strict=True))
    requests = [
        Request(
            prompt_ids=prompts[prompt].tolist(),
            seed=sampling_seed(sidecar.config.seed, stage.name, prompt, sample),
            max_new_tokens=rollout.max_new_tokens,
            stop_token_ids=sidecar.stop_ids,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
        )
        for prompt, sample in identities
    ]
    return make_shard(stage.name, unit, identities, requests, engine.generate(requests))


def make_shard(
    stage: str, unit: int, identities: list[tuple[int, int]], requests: list[Request], responses: list[Response]
) -> Shard:
    """One unit's responses as a `rollouts` shard (`schema.ROLLOUT_COLUMNS`); identities: (prompt, sample) indices."""
    prompt_ids, prompt_offsets = concatenate_ragged([np.array(request.prompt_ids) for request in requests], "int32")
    response_ids, response_offsets = concatenate_ragged([np.array(response.ids) for response in responses], "int32")
    logprobs, _ = concatenate_ragged([np.array(response.logprobs) for response in responses], "float32")
    columns = {
        "prompt_index": [prompt for prompt, _ in identities],
        "sample_index": [sample for _, sample in identities],
        "seed": [request.seed for request in requests],
        "policy_version": [response.version for response in responses],
        "finish_reason": [response.finish_reason for response in responses],
        "prompt_ids": prompt_ids,
        "prompt_offsets": prompt_offsets,
        "response_ids": response_ids,
        "response_offsets": response_offsets,
        "behaviour_logprobs": logprobs,
    }
    typed = {name: np.asarray(column, dtype=ROLLOUT_COLUMNS[name][0]) for name, column in columns.items()}
    return Shard("rollouts", typed, {"stage": stage, "unit": unit})


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


def _report_unit(sidecar: Sidecar, stage: Stage, shard: Shard, unit: int, seconds: float) -> None:
    samples, tokens = len(shard), len(shard["response_ids"])
    finished = float(np.mean(shard["finish_reason"] == FinishReason.STOP))
    sidecar.context.log(
        Event.UNIT,
        stage=stage.name,
        unit=unit,
        samples=samples,
        prompt_tokens=len(shard["prompt_ids"]),
        response_tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        mean_response_length=tokens / samples,
        finished_share=finished,
    )
    logger.info(
        "%s unit %d of %d: %d responses, %d tokens, %.0f tokens/s, %.0f%% finished",
        stage.name, unit + 1, stage.units, samples, tokens, tokens / seconds, 100 * finished,
    )  # fmt: skip
