"""The roles of a run as processes of this machine: which commands, in which environment, and when they are done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_npd.buffer.plan import Plan, Stage
from megatron_npd.config import Config
from megatron_npd.launch.processes import Command
from megatron_npd.run_directory import RunDirectory

TRAINER, ANNOTATOR = "trainer", "annotator"
ROLLOUT = {"teacher": "rollout_teacher", "student": "rollout_student"}
"""Policy -> role name."""


@dataclass(frozen=True)
class Role:
    """Processes that work as one. All exit with status 0 once `is_done()`."""

    name: str
    commands: list[Command]
    is_done: Callable[[], bool]
    """Whether the run directory shows that nothing is left for this role to do."""


def roles_of(config: Config, run: RunDirectory, plan: Plan, scratch: Path) -> list[Role]:
    """Every role of a run that has work left. `scratch`: an empty folder that lives as long as the processes."""
    trainer_ranks, annotator_ranks = config.training.world_size, config.annotator.tensor_model_parallel_size

    def rollout(policy: str, stages: Sequence[Stage]) -> Role:
        name = ROLLOUT[policy]
        argv = [*_npd("rollout", run), "--policy", policy]
        return Role(
            name,
            [Command(name, argv, run.log(name), thread_limits(config, "rollout"))],
            lambda: _all_units(run, "rollouts", stages),
        )

    roles = [
        Role(
            TRAINER,
            _ranks(TRAINER, run, trainer_ranks, scratch, thread_limits(config, TRAINER)),
            lambda: run.version(plan.final_version).is_dir() and run.student.is_dir(),
        ),
        Role(
            ANNOTATOR,
            _ranks(ANNOTATOR, run, annotator_ranks, scratch, thread_limits(config, ANNOTATOR)),
            lambda: _all_units(run, "samples", plan.stages.values()) and run.evaluation(plan.final_version).is_file(),
        ),
        rollout("teacher", plan.teacher_stages),
        rollout("student", plan.round_stages),
    ]
    return [role for role in roles if not role.is_done()]


def thread_limits(config: Config, role: str) -> dict[str, str]:
    """Environment that limits the CPU threads of a process of `trainer`, `annotator` or `rollout`."""
    threads = {"trainer": config.training, "annotator": config.annotator, "rollout": config.rollout}[role].threads
    return {"OMP_NUM_THREADS": str(threads)}


def _ranks(name: str, run: RunDirectory, world_size: int, scratch: Path, env: dict[str, str]) -> list[Command]:
    """One process a rank. They meet at a file that no earlier start has used, so no port is needed."""
    return [
        Command(
            name if rank == 0 else f"{name}.rank{rank}",
            _npd(name, run),
            run.log(name if rank == 0 else f"{name}.rank{rank}"),
            env
            | {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "NPD_RENDEZVOUS": str(scratch / f"{name}.rendezvous"),
                "GLOO_SOCKET_IFNAME": "lo",
            },
        )
        for rank in range(world_size)
    ]


def _npd(command: str, run: RunDirectory) -> list[str]:
    return [sys.executable, "-m", "megatron_npd.cli", command, str(run.config.resolve())]


def _all_units(run: RunDirectory, kind: str, stages: Sequence[Stage]) -> bool:
    return all(run.unit(kind, stage.name, unit).exists() for stage in stages for unit in range(stage.units))
