"""Child processes that cannot outlive their parent: each in its own session, killed as a whole process group.

A child is asked to stop by a signal to itself alone: it may need what it started, a checkpoint's writer for instance,
to stop in order. It is killed by its process group, which is safe because its exit is first only looked at
(`WNOWAIT`): as long as it is not reaped, its id, and so the id of its group, cannot be given to anybody else's process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_npd.errors import STORAGE_STATUS
from megatron_npd.process.parent_death import die_with

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Command:
    """A process to start."""

    name: str
    """What people call it."""
    argv: list[str]
    log: Path
    """Receives its stdout and stderr, appended."""
    env: dict[str, str] = field(default_factory=dict)
    """Added to this process's environment."""
    is_srun: bool = False
    """It stands for processes of a Slurm step, perhaps elsewhere. srun passes SIGUSR1 on to them; at SIGTERM it kills
    them, and waits until they are gone. Killed itself with its process group, it would leave them running."""


def npd(*words: str) -> list[str]:
    """Command line of an npd command, by this interpreter, and without asserts where this has none (`python -O`)."""
    return [sys.executable, *["-O"] * sys.flags.optimize, "-m", "megatron_npd.cli", *words]


class Child:
    """A started `Command`. Start children from the main thread: the kernel ties their life to the starting thread.

    Raises:
        OSError: it cannot be started, or its log cannot be opened.
    """

    def __init__(self, command: Command):
        self.command = command
        self.started = time.monotonic()
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with open(command.log, "ab") as log:
            self.log_start = log.tell()
            """Where the log of this process begins: earlier attempts wrote what lies before."""
            self._process = subprocess.Popen(
                command.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | command.env,
                start_new_session=True,
                preexec_fn=functools.partial(die_with, os.getpid()),
            )

    @property
    def pid(self) -> int:
        """Its process id, and the id of its process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Exit status (negative: the signal that ended it), or None while it runs. Ends what is left of its group."""
        if self._process.returncode is None and self._has_exited():
            self.kill()
            self._process.wait()
        return self._process.returncode

    def ask_to_stop(self) -> None:
        """Send SIGTERM to the process (by srun SIGUSR1 to its tasks), unless it was reaped already."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGUSR1 if self.command.is_srun else signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the whole process group (by srun to all its tasks), unless the child was reaped already."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if self.command.is_srun:
                    os.kill(self.pid, signal.SIGTERM)
                else:
                    os.killpg(self.pid, signal.SIGKILL)

    def _has_exited(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def stop(
    children: Iterable[Child], grace_seconds: float = 10.0, hurry: Callable[[], bool] = lambda: False
) -> list[Child]:
    """End children: SIGTERM, then SIGKILL after `grace_seconds` or as soon as `hurry()` is true. All are reaped.

    Returns:
        Those that had to be killed.
    """
    running = [child for child in children if child.poll() is None]
    for child in running:
        child.ask_to_stop()
    deadline = time.monotonic() + grace_seconds
    while (running := [child for child in running if child.poll() is None]) and not hurry():
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    for child in running:
        child.kill()
    while any(child.poll() is None for child in running):
        time.sleep(POLL_SECONDS)
    return running


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status == STORAGE_STATUS:
        return f"could not write or read its files (status {status})"
    if status > 128 and (name := _signal_name(status - 128)):
        return f"stopped because of {name} (status {status})"
    if status >= 0:
        return f"exited with status {status}"
    return f"was ended by {_signal_name(-status)}" + (" (out of memory?)" if -status == signal.SIGKILL else "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}" if number < 65 else ""
