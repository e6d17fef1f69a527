"""The supervisor: starts the roles on this machine, starts again what fails, and leaves no process behind.

A role that fails is started again, all its ranks together, while the others go on; one that keeps failing without
progress, or that refuses its input, ends the run (`restarts`). A role that left because its work was done is
started again when work came back (a corrupt shard was quarantined). Whatever ends the run, `npd run` continues it from
what is in the run directory.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from megatron_npd.buffer.leases import filesystem_time
from megatron_npd.buffer.plan import Plan, plan_of
from megatron_npd.config import Config, LaunchConfig
from megatron_npd.hardware.device import unused_gpus
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.prepare.dtype import describe_dtype
from megatron_npd.prepare.machine import check_machine
from megatron_npd.prepare.prepare import as_prepared, check_directory, prepare
from megatron_npd.process import activity
from megatron_npd.process.heartbeat import clock_oddity
from megatron_npd.process.metrics import process_seconds
from megatron_npd.roles import SUPERVISOR
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import Event
from megatron_npd.supervise.children import Child, stop
from megatron_npd.supervise.console import Console
from megatron_npd.supervise.exclusive import only_supervisor
from megatron_npd.supervise.guardian import Guardian
from megatron_npd.supervise.journal import Journal
from megatron_npd.supervise.leftovers import remove_dead_signs, remove_unfinished, return_stale_leases
from megatron_npd.supervise.progress import Progress
from megatron_npd.supervise.role_work import Role, roles_of
from megatron_npd.supervise.shift import Shift

POLL_SECONDS = 0.2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
REASONS = {signal.SIGUSR1: "the time limit is near: ", signal.SIGHUP: "the terminal is gone: "}


def supervise(config: Config, conclude: Callable[[RunDirectory, Config, Callable[[str], None]], None]) -> int:
    """Prepare and run everything on this machine; returns the exit status of `npd run`.

    `conclude`: called when all is done, with a function that says a line (`report.conclusion.conclude`).

    Raises:
        UserError: the inputs are refused (see `prepare`), this machine cannot hold the roles (see `check_machine`), or
            another supervisor works in this run directory.
    """
    run = RunDirectory(Path(config.run_directory))
    # Checked before the lock is taken, so that a refusal names the input and not the other supervisor.
    if run.config.is_file():
        check_directory(run, config)
    else:
        prepare(config)
    with only_supervisor(run), tempfile.TemporaryDirectory(prefix="npd_") as scratch:
        # Until now another supervisor may have worked here: its directory was not to change, and if both made a new one
        # it may be of another configuration. What was prepared by now is only checked again.
        prepare(config)
        config = as_prepared(config)
        need = check_machine(config, read_model_dims(config.models.teacher), read_model_dims(config.models.student))
        console = Console(run.log(SUPERVISOR))
        for line in (unused_gpus(), need and need.is_short and str(need)):
            if line:
                console.say(line)
        status = watch_run(run, config, console, lambda plan: roles_of(config, run, plan, Path(scratch)))
        if status == 0:
            conclude(run, config, console.say)
        return status


def watch_run(run: RunDirectory, config: Config, console: Console, roles_of_plan: Callable[[Plan], list[Role]]) -> int:
    """`watch` the roles of a prepared run, of which this is the one supervisor."""
    plan = plan_of(run, config)
    journal = Journal(run)
    progress = Progress(run, plan, journal)
    console.say(f"run directory {run.root}")
    console.say(describe_dtype(config))
    _clean_up(run, console)
    journal.record(Event.START, import_seconds=process_seconds())
    status = watch(run, roles_of_plan(plan), console, journal, progress.describe, config.launch)
    progress.finish()
    return status


def watch(
    run: RunDirectory,
    roles: Sequence[Role],
    console: Console,
    journal: Journal,
    describe: Callable[[Sequence[Child]], str],
    launch: LaunchConfig,
) -> int:
    """Run roles until all are done, one fails for good, or a signal asks to stop; no process is left when it returns.

    Returns:
        0; 1 or, for refused input, 2 after a failure; 128 + signal number after a signal.
    """
    names = ", ".join(role.name for role in roles)
    with _stop_requests() as requests, Guardian() as guardian, activity.doing(f"watching {names}"):
        shift = Shift(run, roles, console, journal, launch, guardian, lambda: bool(requests))
        try:
            while not requests:
                status = shift.look()
                if status is not None:
                    return status
                if console.wants_progress:
                    with contextlib.suppress(OSError):  # the run directory cannot be read just now
                        console.progress(describe(shift.running))
                time.sleep(POLL_SECONDS)
            number = signal.Signals(requests[0])
            console.say(f"{number.name}: {REASONS.get(number, '')}stopping the roles (once more to kill them at once)")
            journal.record(Event.STOP, signal=number.name)
            return 128 + number
        finally:
            # Every way out of this function, an exception included, ends here. Hurried by the same signal again:
            # another one says nothing new, a batch system sends SIGUSR1 and then, when the time is up, SIGTERM.
            for child in stop(shift.running, launch.grace_seconds, lambda: len(requests) > len(set(requests))):
                console.say(f"{child.command.name} did not stop and was killed")
            if requests:
                console.say("stopped; started again, the run continues from here")


def _clean_up(run: RunDirectory, console: Console) -> None:
    """Put away what processes that are gone have left, and say what is odd about this host."""
    if returned := return_stale_leases(run):
        console.say(f"returned {returned} leases of processes that are gone")
    remove_dead_signs(run)
    if removed := remove_unfinished(run):
        console.say(f"removed {removed} files and folders that processes long gone had begun to write")
    if odd := clock_oddity(time.time() - filesystem_time(run.root)):
        console.say(odd)


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Signals are collected in a list instead of interrupting; the old handlers come back at the end."""
    requests: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(number)

    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
