"""The last process of a run to leave: it ends whatever the supervisor leaves behind, however the supervisor ended.

Every process the supervisor starts carries a mark in its environment, and so does whatever that one starts, in whatever
session or process group. The guardian waits on a pipe that only the supervisor holds open. When the pipe closes, it
kills what carries the mark. It imports nothing but the standard library and takes a few megabytes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

MARK = "NPD_SUPERVISOR"
"""Environment variable: names the one supervisor a process belongs to."""
LEAVE_SECONDS = 10.0
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Guardian:
    """A guardian process. A context manager: leaving it ends every process that is left."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self.environment = {MARK: self._mark}
        """For every process that must not outlive this one."""

    def __enter__(self) -> Guardian:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._pipe)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it goes on without us
            self._process.wait(LEAVE_SECONDS)

    def keep(self) -> None:
        """Start another one if somebody killed it."""
        if self._process.poll() is not None:
            os.close(self._pipe)
            self._start()

    def _start(self) -> None:
        reader, self._pipe = os.pipe()
        # By its path and isolated: the modules beside it have names of the standard library's.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, self._mark],
            stdin=reader,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(reader)


def marked(mark: str) -> list[int]:
    """Process ids that carry a mark, as far as this user may look."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def guard(mark: str) -> None:
    """Wait for the end of standard input, then kill what carries the mark until nothing does."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    until = time.monotonic() + LEAVE_SECONDS
    # A dead process has no environment to read any more; one that is forked meanwhile is found the next time.
    while (left := marked(mark)) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


if __name__ == "__main__":
    guard(sys.argv[1])
