"""What `npd check` says a run will take: memory of each role, space on disk, time, and how to divide the GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_npd.buffer.plan import Plan, Stage
from megatron_npd.config import Config, SlurmConfig
from megatron_npd.estimates.disk import disk_estimate
from megatron_npd.estimates.division import Sizes, best_division
from megatron_npd.estimates.rates import Rates, read_rates
from megatron_npd.estimates.role_memory import RoleMemory, annotator_memory, rollout_memory, trainer_memory
from megatron_npd.estimates.simulation import Timeline, Workers, simulate
from megatron_npd.estimates.workload import workload
from megatron_npd.hardware.device import Device, device_here
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.process.durations import duration
from megatron_npd.process.waiting import takes_turns
from megatron_npd.roles import ROLES
from megatron_npd.run_directory import HELDOUT_STAGE


def estimate(
    config: Config, teacher: ModelDims, student: ModelDims, plan: Plan, rates_from: Path | None
) -> Iterator[str]:
    """Lines for a reader.

    `rates_from`: a TOML file of rates or the directory of a run that measured them; None: no time is estimated.

    Raises:
        UserError: the rates cannot be read.
    """
    rates = read_rates(rates_from) if rates_from else None
    yield from _memory(config, teacher, student, plan)
    yield from _disk(config, plan, student, rates)
    yield from _time(config, plan, rates, rates_from)


def device_of(config: Config) -> Device:
    """What the roles will compute on: a `[slurm]` table says whether its nodes have GPUs; without one, this machine."""
    if names_slurm(config):
        return "gpu" if config.slurm.gpus_per_node else "cpu"
    return device_here()


def names_slurm(config: Config) -> bool:
    """Whether its file has a `[slurm]` table. A run's own config.toml always has one, where every default is written
    out: if nothing else is in it, nobody wrote it."""
    slurm = config.slurm
    is_written_out = slurm.model_fields_set == set(SlurmConfig.model_fields) and slurm == SlurmConfig()
    return bool(slurm.model_fields_set) and not is_written_out


def role_memories(
    config: Config, teacher: ModelDims, student: ModelDims, device: Device, plan: Plan | None = None
) -> list[RoleMemory]:
    """One process of each role; without a plan, as if there were prompts to fill an engine with and none held out."""
    heldout, of_teacher, of_a_round = 0, None, None
    if plan:
        heldout = _responses([plan.stages[HELDOUT_STAGE]])
        of_teacher = _responses(plan.teacher_stages)
        of_a_round = max((_responses([stage]) for stage in plan.round_stages), default=0)
    students = [rollout_memory(config, student, device, responses=of_a_round)] if config.rounds.count else []
    return [
        trainer_memory(config, student, device),
        annotator_memory(config, teacher, student, device, heldout),
        rollout_memory(config, teacher, device, refreshed=False, responses=of_teacher),
        *students,
    ]


def _responses(stages: list[Stage]) -> int:
    """Those that an engine samples."""
    return sum(stage.own for stage in stages)


def workers_of(config: Config) -> Workers:
    """How many workers of each role the configuration asks for: under Slurm, or on this one machine."""
    replicas = config.training.data_parallel_size
    if names_slurm(config):
        return Workers(replicas, config.slurm.annotators, config.slurm.sidecars, turns=config.launch.turns == "on")
    return Workers(replicas, 1, min(1, config.rounds.count), teacher_sidecars=1, turns=takes_turns(config))


def _memory(config: Config, teacher: ModelDims, student: ModelDims, plan: Plan) -> Iterator[str]:
    device = device_of(config)
    where = "a CPU" if device == "cpu" else "a GPU, beside what CUDA and NCCL take"
    yield f"memory of one process of each role on {where}:"
    for memory in role_memories(config, teacher, student, device, plan):
        limit = config.slurm.gpu_memory_gib
        too_much = device == "gpu" and memory.bytes > limit * 2**30
        excess = f"   MORE THAN slurm.gpu_memory_gib = {limit:g}" if too_much else ""
        yield f"  {memory.role:<30} {size_text(memory.bytes):>10}{excess}"
        for term in memory.terms:
            yield f"    {term.name:<28} {size_text(term.bytes):>10}   {term.formula}"


def _disk(config: Config, plan: Plan, student: ModelDims, rates: Rates | None) -> Iterator[str]:
    disk = disk_estimate(config, plan, student, rates.samples if rates else None)
    yield f"disk: {'' if rates else 'at most '}{size_text(disk.bytes)}"
    for name, nbytes, what in (
        ("rollouts", disk.rollouts, ""),
        ("samples", disk.samples, f"with the teacher's top {config.annotator.top_k}"),
        ("weights", disk.versions, f"{plan.final_version + 1} versions"),
        ("checkpoints", disk.checkpoints, f"{config.training.keep_checkpoints} kept, and one being written"),
    ):
        yield f"    {name:<28} {size_text(nbytes):>10}   {what}".rstrip()


def _time(config: Config, plan: Plan, rates: Rates | None, rates_from: Path | None) -> Iterator[str]:
    if rates is None:
        yield "time: not estimated; --rates takes a file of rates, or the directory of a run that measured them"
        return
    work, workers = workload(config, plan, rates), workers_of(config)
    timeline = simulate(work, rates, workers)
    yield f"time, at the rates of {rates_from}: {duration(timeline.seconds)}"
    yield from _shares(timeline)
    if not names_slurm(config):
        return
    sizes = Sizes.of(config)
    gpus = sizes.gpus(workers)
    best = best_division(work, rates, sizes, gpus)
    if best is None or best.timeline.seconds > 0.99 * timeline.seconds:
        yield f"    no other division of these {gpus} devices is faster"
        return
    yield (
        f"    faster, {duration(best.timeline.seconds)} on {sizes.gpus(best.workers)} of these {gpus} devices: "
        f"training.data_parallel_size = {best.workers.replicas}, slurm.annotators = {best.workers.annotators}, "
        f"slurm.sidecars = {best.workers.sidecars}"
    )


def _shares(timeline: Timeline) -> Iterator[str]:
    for role in ROLES:
        count = timeline.workers[role]
        yield f"    {role:<28} {duration(timeline.busy(role)):>10}   busy, idle for {timeline.idle_share(role):.0%}" + (
            f"; mean of {count} workers" if count > 1 else ""
        )


def size_text(nbytes: float) -> str:
    """Bytes for people, e.g. `6.2 GiB`."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes / 2**10:.1f} KiB"
