"""The supervisor inside a Slurm job: `npd supervise` watches srun steps as `npd run` watches processes of this machine.

Every step is a role's part on some nodes. One that fails is started again; one whose node has left the job, or that
keeps failing, is given up: the run goes on without it as long as the role has others. The batch script says what the
steps are (`slurm.script`).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_npd.buffer.plan import Plan
from megatron_npd.config import Config
from megatron_npd.errors import UserError
from megatron_npd.prepare.prepare import open_run
from megatron_npd.process.heartbeat import STEP as STEP_VARIABLE
from megatron_npd.roles import ROLES, ROLLOUT, ROLLOUT_TEACHER, SUPERVISOR
from megatron_npd.run_directory import RunDirectory
from megatron_npd.supervise.children import Command
from megatron_npd.supervise.console import Console
from megatron_npd.supervise.exclusive import only_supervisor
from megatron_npd.supervise.role_work import Role, roles_of
from megatron_npd.supervise.supervisor import watch_run

STEP = "--step"
SLURM_SECONDS = 60.0
"""How long a question to Slurm's controller may take."""


@dataclass(frozen=True)
class SrunStep:
    """One srun command line."""

    name: str
    """ROLE or ROLE.PLACE."""
    argv: list[str]

    @property
    def kind(self) -> str:
        """Its role: trainer, annotator or rollout."""
        return self.name.split(".")[0]


def supervise_steps(config: Config, words: list[str]) -> int:
    """Start the steps of a prepared run and watch them; returns the exit status of `npd supervise`.

    Args:
        words: `--step NAME COMMAND...`, as often as there are steps.

    Raises:
        UserError: see `parse_steps`, or the run directory is not prepared, or another supervisor works in it.
    """
    steps = parse_steps(words)
    run = open_run(config)
    with only_supervisor(run):
        console = Console(run.log(SUPERVISOR))
        return watch_run(run, config, console, lambda plan: roles_of_steps(config, run, plan, steps))


def parse_steps(words: list[str]) -> list[SrunStep]:
    """The steps of a command line.

    Raises:
        UserError: no step, a name twice or of no role, a step without a command, or a role without a step.
    """
    steps: list[SrunStep] = []
    for word in words:
        if word == STEP:
            steps.append(SrunStep("", []))
        elif not steps:
            raise UserError(f"npd supervise: {word}: must be {STEP} NAME COMMAND...")
        elif not steps[-1].name:
            steps[-1] = SrunStep(word, [])
        else:
            steps[-1].argv.append(word)
    for index, step in enumerate(steps):
        if step.kind not in ROLES:
            raise UserError(f"{STEP} {step.name}: must be called {', '.join(ROLES)}, or one of these and .PLACE")
        if not step.argv:
            raise UserError(f"{STEP} {step.name}: no command")
        if step.name in {other.name for other in steps[:index]}:
            raise UserError(f"{STEP} {step.name}: named twice")
    for kind in ROLES:
        if kind not in {step.kind for step in steps}:
            raise UserError(f"{STEP} {kind}: missing; the run could not be finished")
    return steps


def roles_of_steps(config: Config, run: RunDirectory, plan: Plan, steps: list[SrunStep]) -> list[Role]:
    """What `roles_of` says of a role's work holds for each of its steps."""
    work = {role.name: role for role in roles_of(config, run, plan, run.root)}
    teacher, student = work[ROLLOUT_TEACHER], work[ROLLOUT]
    # A sidecar of a cluster samples for both policies (see `policies`).
    work[student.name] = replace(
        student,
        is_done=lambda: teacher.is_done() and student.is_done(),
        done=lambda: teacher.done() + student.done(),
    )
    return [_role(run, step, work[step.kind]) for step in steps]


def _role(run: RunDirectory, step: SrunStep, work: Role) -> Role:
    command = Command(step.name, step.argv, run.log(f"{step.name}.srun"), {STEP_VARIABLE: step.name}, is_srun=True)
    return replace(
        work,
        name=step.name,
        kind=step.kind,
        commands=lambda: [command],
        # Its devices are its own: nobody would gain by its starting later. And a sidecar here is the teacher's first.
        is_wanted=lambda: True,
        is_lost=_is_lost(step),
    )


def _is_lost(step: SrunStep) -> Callable[[], bool]:
    """Whether a node of a step has left the job: one that failed never comes back to it."""
    wanted = next((word.partition("=")[2] for word in step.argv if word.startswith("--nodelist=")), "")

    def is_lost() -> bool:
        left = nodes_left() if wanted else None
        return left is not None and not left >= set(wanted.split(","))

    return is_lost


def nodes_left() -> set[str] | None:
    """Names of the nodes that are part of this job now; None where Slurm does not say."""
    try:
        ranges = _ask_slurm("squeue", "--noheader", f"--jobs={os.environ['SLURM_JOB_ID']}", "--format=%N")
        return {node for nodes in ranges for node in _ask_slurm("scontrol", "show", "hostnames", nodes)} or None
    except (KeyError, OSError, subprocess.SubprocessError):
        return None


def _ask_slurm(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SLURM_SECONDS).stdout.split()
