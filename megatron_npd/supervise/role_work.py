"""The roles of a run as processes of this machine: which commands, in which environment, and when they are done."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_npd.buffer.evaluations import answered_exams, open_exams
from megatron_npd.buffer.listing import finished_units, is_finished
from megatron_npd.buffer.plan import Plan, Stage
from megatron_npd.config import Config
from megatron_npd.hardware.device import device_here
from megatron_npd.process.waiting import takes_turns
from megatron_npd.roles import ANNOTATOR, ROLLOUT, ROLLOUT_TEACHER, SIDECAR, STUDENT, TEACHER, TRAINER
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import TEACHER_VERSION
from megatron_npd.supervise.children import Command, npd
from megatron_npd.supervise.resume_point import resume_point
from megatron_npd.versions.manifest import published_versions


@dataclass(frozen=True)
class Role:
    """Processes that work as one. All exit with status 0 when nothing is left for them to do."""

    name: str
    commands: Callable[[], list[Command]]
    """The processes of one start; asked for again at each start, because ranks must meet at a fresh place."""
    is_done: Callable[[], bool]
    """Whether the run directory shows that nothing is left to do. May become false again: see `supervisor`."""
    done: Callable[[], int] = lambda: 0
    """How much of its work the run directory holds: a number that grows as the role makes progress."""
    kind: str = ""
    """What roles have in common that do the same work, so that a run can do without one of them."""
    is_wanted: Callable[[], bool] = lambda: True
    """Asked before its first start: whether there is something for it to do. One that waits takes memory, and its start
    takes cores from those that work."""
    is_lost: Callable[[], bool] = lambda: False
    """Asked when it has failed: whether it can never work again, because its machine is gone."""


def roles_of(config: Config, run: RunDirectory, plan: Plan, scratch: Path) -> list[Role]:
    """Every role of a run, in the order in which they get something to do; where they take turns, none starts earlier.

    `scratch`: a folder that lives as long as the processes.
    """
    work = Work(run, plan)

    def ranks(name: str, world_size: int) -> Callable[[], list[Command]]:
        return lambda: _ranks(name, run, world_size, scratch, role_environment(config, name))

    def sidecar(policy: str) -> Callable[[], list[Command]]:
        name, argv = SIDECAR[policy], [*npd(ROLLOUT, str(run.config.resolve())), "--policy", policy]
        return lambda: [Command(name, argv, run.log(name), role_environment(config, ROLLOUT))]

    roles = [
        Role(
            ROLLOUT_TEACHER,
            sidecar(TEACHER),
            is_done=lambda: work.is_sampled(plan.teacher_stages),
            done=lambda: work.sampled(plan.teacher_stages),
        ),
        Role(
            ANNOTATOR,
            ranks(ANNOTATOR, config.annotator.tensor_model_parallel_size),
            is_done=work.is_annotated,
            done=work.annotated,
            is_wanted=work.wants_annotator,
        ),
        Role(
            TRAINER,
            ranks(TRAINER, config.training.world_size),
            is_done=run.student.is_dir,
            done=work.trained,
            is_wanted=work.wants_trainer,
        ),
        Role(
            ROLLOUT,
            sidecar(STUDENT),
            is_done=work.student_is_done,
            done=lambda: work.sampled(plan.round_stages) + answered_exams(run, plan),
            is_wanted=work.wants_student,
        ),
    ]
    return roles if takes_turns(config) else [replace(role, is_wanted=lambda: True) for role in roles]


@dataclass(frozen=True)
class Work:
    """What a run directory shows of the plan's work: how much of it is done, and who could begin with some."""

    run: RunDirectory
    plan: Plan

    def is_sampled(self, stages: list[Stage]) -> bool:
        """Whether every response of these stages is there."""
        return all(is_finished(self.run, "rollouts", stage) for stage in stages)

    def sampled(self, stages: list[Stage]) -> int:
        """Units of these stages that are rolled out."""
        return sum(len(finished_units(self.run, "rollouts", stage)) for stage in stages)

    def is_annotated(self) -> bool:
        """Whether every sample is judged and every version evaluated that is to be."""
        annotated = all(is_finished(self.run, "samples", stage) for stage in self.plan.training_stages)
        return annotated and all(self.run.evaluation(version).is_file() for version in self.plan.evaluated)

    def annotated(self) -> int:
        """Units that are judged, and versions that are evaluated."""
        units = sum(len(finished_units(self.run, "samples", stage)) for stage in self.plan.training_stages)
        return units + sum(self.run.evaluation(version).is_file() for version in self.plan.evaluated)

    def trained(self) -> int:
        """Versions that are published, and steps that are saved."""
        point = resume_point(self.run)
        return len(published_versions(self.run)) + (point.step if point else 0)

    def wants_annotator(self) -> bool:
        """Whether there is a unit to judge."""
        return bool(finished_units(self.run, "rollouts", self.plan.training_stages[0]))

    def wants_trainer(self) -> bool:
        """Whether samples begin to come, or there is no warm-up: then all begins with the version it publishes."""
        first = self.plan.training_stages[0]
        return first.version != TEACHER_VERSION or bool(finished_units(self.run, "samples", first))

    def student_is_done(self) -> bool:
        """Whether every round is sampled and every evaluation answered."""
        return self.is_sampled(self.plan.round_stages) and not open_exams(self.run, self.plan)

    def wants_student(self) -> bool:
        """Whether the teacher's engine has left, so that there is one at a time, and the version is there that the next
        round is sampled from, or that is next to be evaluated."""
        left = [stage.version for stage in self.plan.round_stages if not is_finished(self.run, "rollouts", stage)]
        left += [exam.version for exam in open_exams(self.run, self.plan)]
        return self.is_sampled(self.plan.teacher_stages) and (not left or self.run.version(min(left)).is_dir())


def role_environment(config: Config, role: str) -> dict[str, str]:
    """What a process of `trainer`, `annotator` or `rollout` needs in its environment before it imports anything."""
    threads = {TRAINER: config.training, ANNOTATOR: config.annotator, ROLLOUT: config.rollout}[role].threads
    environment = {
        "OMP_NUM_THREADS": str(threads),
        # Idle OpenMP threads otherwise spin, and take the cores from the role whose turn it is (10 times slower).
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",  # everything lies on this filesystem; a look-up elsewhere would only hang
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device_here() == "gpu":
        environment |= {n: value for n, value in _gpu_environment(config, role).items() if n not in os.environ}
    return environment


def _gpu_environment(config: Config, role: str) -> dict[str, str]:
    """What a role wants of CUDA; what the user set stands."""
    if role == ROLLOUT:  # vLLM chooses for itself
        return {"VLLM_BATCH_INVARIANT": "1"} if config.deterministic else {}
    environment = {}
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        # Packs differ in their numbers of sequences and rows: blocks of fixed sizes would leave holes.
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if {TRAINER: config.training, ANNOTATOR: config.annotator}[role].tensor_model_parallel_size > 1:
        # One queue: a collective that overlaps with a product must have been launched before it (Megatron-Core's
        # tensor_parallel/layers.py).
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if config.deterministic:
        environment |= {
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's attention
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what torch asks for
            "NCCL_ALGO": "Ring",  # sums in an order that does not depend on the load
        }
    return environment


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
        commands.append(Command(process, npd(name, str(run.config.resolve())), run.log(process), env | of_rank))
    return commands
