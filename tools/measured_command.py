"""A command run to its end, with the signals this process gets, and what it took beside what others did meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_npd.supervise.supervisor import STOP_SIGNALS


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    """As a shell has it."""
    seconds: float
    """By the clock."""
    cores_used_by_others: float
    """On average, by all processes that are neither this one nor its children."""


def measured(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Done:
    """Run a command and say what it took."""
    before = _cpu_seconds()
    status = to_the_end(command, environment)
    elapsed, everyone, own = (after - b for after, b in zip(_cpu_seconds(), before, strict=True))
    return Done(status, elapsed, max(everyone - own, 0.0) / elapsed)


def to_the_end(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Exit status of a command, as a shell has it; it gets the signals that this process gets.

    In a session of its own: from the terminal each would reach it twice, and the second one kills the roles.
    """
    asked: list[int] = []
    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, lambda got, _: asked.append(got)) for number in wanted}
    try:
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        while (status := _waited(child, 0.2)) is None:
            while asked:
                child.send_signal(asked.pop(0))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _waited(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _cpu_seconds() -> tuple[float, float, float]:
    """Seconds so far of: the clock, all cores' work, the work of this process and of the children that have ended."""
    user, nice, system = (int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:4])
    everyone, own = (user + nice + system) / os.sysconf("SC_CLK_TCK"), os.times()
    return time.monotonic(), everyone, sum(own[:4])
