"""A supervisor over small Python processes, and looking at processes by their ids."""

from __future__ import annotations

import io
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_npd.config import LaunchConfig
from megatron_npd.run_directory import RunDirectory
from megatron_npd.supervise.children import Command
from megatron_npd.supervise.console import Console
from megatron_npd.supervise.journal import Journal
from megatron_npd.supervise.role_work import Role
from megatron_npd.supervise.supervisor import watch

SLEEP = "import time; time.sleep(60)"
WITH_GRANDCHILD = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
print(os.getpid(), child.pid, flush=True)
"""


def python(folder: Path, name: str, code: str) -> Command:
    return Command(name, [sys.executable, "-S", "-c", textwrap.dedent(code)], folder / f"{name}.log")


def role(
    folder: Path, name: str, code: str, is_done: Callable[[], bool] = lambda: False, done: Callable[[], int] = lambda: 0
) -> Role:
    return Role(name, lambda: [python(folder, name, code)], is_done, done)


def run(folder: Path, roles: Sequence[Role], **launch: float) -> tuple[int, str]:
    """Exit status and output of a supervisor over these roles, which by default starts nothing again."""
    stream, directory = io.StringIO(), RunDirectory(folder)
    console = Console(folder / "supervisor.log", stream)
    keys = LaunchConfig(**({"max_restarts": 0, "restart_delay_seconds": 0.05, "grace_seconds": 10.0} | launch))
    status = watch(directory, roles, console, Journal(directory), lambda children: f"{len(children)} running", keys)
    return status, stream.getvalue()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def pids_in(*logs: Path) -> list[int]:
    """The process ids that `WITH_GRANDCHILD` printed, once there are two in each log."""
    wait_until(lambda: all(log.exists() and len(log.read_text().split()) >= 2 for log in logs))
    return [int(word) for log in logs for word in log.read_text().split()[:2]]


def until_supervisor_says(folder: Path, words: str) -> str:
    """Code with which a role waits until its supervisor has logged these words."""
    log = str(folder / "supervisor.log")
    return f"import time\nwhile {words!r} not in open({log!r}).read(): time.sleep(0.02)"
