"""The roles of a run as processes of this machine: which commands, in which environment, and when they are done."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_npd.buffer.listing import finished_units, is_finished
from megatron_npd.buffer.plan import Plan, Stage
from megatron_npd.buffer.versions import published_versions
from megatron_npd.config import Config
from megatron_npd.launch.processes import Command
from megatron_npd.launch.resume_point import resume_point
from megatron_npd.run_directory import RunDirectory

TRAINER, ANNOTATOR = "trainer", "annotator"
ROLLOUT = {"teacher": "rollout_teacher", "student": "rollout"}
"""Policy -> role name, as `rollout.sidecar.ROLE_NAMES` has it (not imported: it brings an engine along)."""


@dataclass(frozen=True)
class Role:
    """Processes that work as one. All exit with status 0 when nothing is left for them to do."""

    name: str
    commands: Callable[[], list[Command]]
    """The processes of one start; asked for again at each start, because ranks must meet at a fresh place."""
    is_done: Callable[[], bool]
    """Whether the run directory shows that nothing is left to do. May become false again: see `supervisor`."""
    done: Callable[[], int] = lambda: 0
    """How much of its work the run directory holds: a number that grows as the role gets further."""
    kind: str = ""
    """What roles have in common that do the same work, so that a run can do without one of them."""
    is_lost: Callable[[], bool] = lambda: False
    """Asked when it has failed: whether it can never work again, because its machine is gone."""


def roles_of(config: Config, run: RunDirectory, plan: Plan, scratch: Path) -> list[Role]:
    """Every role of a run. `scratch`: a folder that lives as long as the processes."""

    def ranks(name: str, world_size: int) -> Callable[[], list[Command]]:
        return lambda: _ranks(name, run, world_size, scratch, role_environment(config, name))

    def is_annotated() -> bool:
        annotated = all(is_finished(run, "samples", stage) for stage in plan.training_stages)
        return annotated and run.evaluation(plan.final_version).is_file()

    def annotated() -> int:
        units = sum(len(finished_units(run, "samples", stage)) for stage in plan.training_stages)
        return units + sum(run.evaluation(version).is_file() for version in range(plan.final_version + 1))

    def trained() -> int:
        point = resume_point(run)
        return len(published_versions(run)) + (point.step if point else 0)

    def rollout(policy: str, stages: list[Stage]) -> Role:
        name = ROLLOUT[policy]
        argv = [*_npd("rollout", run), "--policy", policy]
        return Role(
            name,
            lambda: [Command(name, argv, run.log(name), role_environment(config, "rollout"))],
            lambda: all(is_finished(run, "rollouts", stage) for stage in stages),
            lambda: sum(len(finished_units(run, "rollouts", stage)) for stage in stages),
        )

    return [
        Role(TRAINER, ranks(TRAINER, config.training.world_size), run.student.is_dir, trained),
        Role(ANNOTATOR, ranks(ANNOTATOR, config.annotator.tensor_model_parallel_size), is_annotated, annotated),
        rollout("teacher", plan.teacher_stages),
        rollout("student", plan.round_stages),
    ]


def role_environment(config: Config, role: str) -> dict[str, str]:
    """What a process of `trainer`, `annotator` or `rollout` needs in its environment before it imports anything."""
    threads = {"trainer": config.training, "annotator": config.annotator, "rollout": config.rollout}[role].threads
    return {
        "OMP_NUM_THREADS": str(threads),
        # Idle OpenMP threads otherwise spin, and take the cores from the role whose turn it is (10 times slower).
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",  # everything lies on this filesystem; a look-up elsewhere would only hang
        "TOKENIZERS_PARALLELISM": "false",
    }


def _ranks(name: str, run: RunDirectory, world_size: int, scratch: Path, env: dict[str, str]) -> list[Command]:
    """One process a rank. They meet at a file in a folder of their own, so no port is needed."""
    rendezvous = Path(tempfile.mkdtemp(prefix=f"{name}_", dir=scratch)) / "rendezvous"
    commands = []
    for rank in range(world_size):
        process = name if rank == 0 else f"{name}.rank{rank}"
        of_rank = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "NPD_RENDEZVOUS": str(rendezvous),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        commands.append(Command(process, _npd(name, run), run.log(process), env | of_rank))
    return commands


def _npd(command: str, run: RunDirectory) -> list[str]:
    return [sys.executable, "-m", "megatron_npd.cli", command, str(run.config.resolve())]
