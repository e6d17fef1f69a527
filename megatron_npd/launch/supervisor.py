"""The supervisor: starts the roles on this machine, watches them, and leaves no process behind.

A role that fails ends the run: the others are stopped, and `npd run` continues from what is in the run directory.
A role that left because its work was done is started again when work came back (a corrupt shard was quarantined).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from megatron_npd.buffer.plan import make_plan
from megatron_npd.config import Config
from megatron_npd.data.prompts import load_prompt_set
from megatron_npd.errors import USAGE_STATUS, UserError
from megatron_npd.launch.console import Console
from megatron_npd.launch.logs import tail
from megatron_npd.launch.prepare import prepare
from megatron_npd.launch.processes import Child, describe_exit, stop
from megatron_npd.launch.progress import Progress
from megatron_npd.launch.roles import Role, roles_of
from megatron_npd.launch.stale_leases import return_stale_leases
from megatron_npd.run_directory import RunDirectory

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0
"""How long a stopped role may take to leave before it is killed."""
LOOK_SECONDS = 5.0
"""How often the supervisor looks whether a role that has left is needed again."""
MAX_STARTS = 4
"""Work comes back rarely (a corrupt shard); a role that keeps leaving its work undone must not loop."""
LOG_LINES = 15


def supervise(config: Config) -> int:
    """Prepare and run everything on this machine; returns the exit status of `npd run`.

    Raises:
        UserError: the inputs are refused (see `prepare`), or another supervisor works in this run directory.
    """
    run = prepare(config)
    with _only_supervisor(run), tempfile.TemporaryDirectory(prefix="npd_") as scratch:
        plan = make_plan(
            config, len(load_prompt_set(run.prompts("train"))), len(load_prompt_set(run.prompts("heldout")))
        )
        console, progress = Console(run.log("supervisor")), Progress(run, plan)
        roles = roles_of(config, run, plan, Path(scratch))
        console.say(f"run directory {run.root}")
        if returned := return_stale_leases(run):
            console.say(f"returned {returned} leases of processes that are gone")
        status = watch(roles, console, progress.describe)
        progress.finish()
        if status == 0:
            _conclude(run, config, console)
        return status


def watch(roles: Sequence[Role], console: Console, describe: Callable[[Sequence[Child]], str]) -> int:
    """Run roles until all are done, one fails, or a signal asks to stop; no child is left when it returns.

    Returns:
        0; 1 or, for refused input, 2 after a failure; 128 + signal number after SIGINT or SIGTERM.
    """
    crews = [_Crew(role) for role in roles]
    look = 0.0
    with _stop_requests() as requests:
        try:
            while not requests:
                if failed := [child for crew in crews for child in crew.children if child.poll()]:
                    return _explain_failure(failed[0], console)
                all_left = all(crew.has_left for crew in crews)
                if all_left or time.monotonic() > look:
                    look = time.monotonic() + LOOK_SECONDS
                    needed = [crew for crew in crews if crew.has_left and not crew.role.is_done()]
                    if all_left and not needed:
                        return 0
                    if any(not crew.start(console) for crew in needed):
                        return 1
                if console.wants_progress:
                    console.progress(describe([child for crew in crews for child in crew.running]))
                time.sleep(POLL_SECONDS)
            console.say(f"{signal.Signals(requests[0]).name}: stopping the roles (once more to kill them at once)")
            return 128 + requests[0]
        finally:
            # Every way out of this function, an exception included, ends here.
            killed = stop(
                (child for crew in crews for child in crew.children), GRACE_SECONDS, lambda: len(requests) > 1
            )
            for child in killed:
                console.say(f"{child.command.name} did not stop and was killed")
            if requests:
                console.say("stopped; the same `npd run` continues from here")


class _Crew:
    """The processes of one role, and how often they were started."""

    def __init__(self, role: Role):
        self.role = role
        self.children: list[Child] = []
        self._starts = 0

    @property
    def running(self) -> list[Child]:
        return [child for child in self.children if child.poll() is None]

    @property
    def has_left(self) -> bool:
        return not self.running

    def start(self, console: Console) -> bool:
        """Start every process of the role; False if it has had its chances."""
        if self._starts == MAX_STARTS:
            console.say(f"{self.role.name} exited with status 0 {MAX_STARTS} times and left its work undone")
            return False
        self._starts += 1
        console.say(f"starting {self.role.name}" + (" again: there is work for it" if self._starts > 1 else ""))
        self.children = []
        for command in self.role.commands():
            self.children.append(Child(command))  # one by one: those started are stopped if the next cannot be
        return True


def _explain_failure(child: Child, console: Console) -> int:
    """Say which process failed, how, and what it said last; returns the status to exit with."""
    status, log = child.poll() or 0, child.command.log
    console.say(f"{child.command.name} {describe_exit(status)}; the end of {log}:")
    for line in tail(log, LOG_LINES, child.log_start):
        console.say(f"    {line}")
    console.say("stopping the other roles; once the fault is mended the same `npd run` continues from here")
    return USAGE_STATUS if status == USAGE_STATUS else 1


def _conclude(run: RunDirectory, config: Config, console: Console) -> None:
    from megatron_npd.launch.summary import write_report  # draws: not imported by commands that do not report

    summary = write_report(run, config)
    before, after = summary.get("heldout_kl_before"), summary.get("heldout_kl_after")
    if before is not None and after is not None:
        console.say(f"held-out KL(teacher || student): {before:.4f} before, {after:.4f} after, nats a token")
    console.say(
        f"{summary.get('rollouts_generated')} responses, {summary.get('rollouts_kept')} kept, "
        f"{summary.get('optimizer_steps')} optimizer steps"
    )
    console.say(f"student: {run.student if run.student.is_dir() else run.weights}")
    console.say(f"report:  {run.report}")


@contextlib.contextmanager
def _only_supervisor(run: RunDirectory) -> Iterator[None]:
    """Hold RUN/supervisor.lock; the kernel drops it when this process ends, however it ends."""
    path = run.root / "supervisor.lock"
    with open(path, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"run_directory = {run.root}: process {lock.read().strip() or 'unknown'} already runs it; one at a time"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are collected in a list instead of interrupting; the old handlers come back at the end."""
    requests: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
