"""Signs of life: every process of a run keeps a small file in RUN/status that says who it is and what it does.

The file is replaced when the activity changed and touched when not, by a thread, a few times a minute. Its
modification time is the beat: the filesystem's clock stamped it, so hosts whose clocks disagree can be compared. All
times in it are by that clock as well. It is removed when the process ends; one that was killed leaves it behind.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_npd.process import activity
from megatron_npd.run_directory import RunDirectory

logger = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
QUIET_SECONDS = 30.0
"""A process whose last beat is older gives no sign of life."""
STEP = "NPD_STEP"
"""Environment variable: name of the Slurm step a process belongs to."""
SKEW_SECONDS = 5.0
"""Clocks that differ by more are worth a word."""


@dataclass(frozen=True)
class Sign:
    """What a process last reported; times are Unix seconds by the filesystem's clock."""

    role: str
    rank: int
    host: str
    pid: int
    directory: int
    """Inode of the run directory: a copy of it has another, and nothing in its status/ is alive."""
    started: float
    state: str
    what: str
    since: float
    changes: int
    step: str = ""
    """The Slurm step it belongs to, if `npd supervise` started it."""
    beat: float = 0.0
    """When it was last heard of; not in the file, whose modification time it is."""

    @property
    def name(self) -> str:
        """What people call the process; as its log is called."""
        return f"{self.role}.rank{self.rank}" if self.rank else self.role


class Heartbeat:
    """Keeps this process's file. A context manager, or `start` it and let the end of the process stop it."""

    def __init__(self, run: RunDirectory, role: str, rank: int = 0, beat_seconds: float = BEAT_SECONDS):
        self._run, self._role, self._rank = run, role, rank
        self._path = run.status(role, rank, socket.gethostname(), os.getpid())
        self._beat_seconds = beat_seconds
        self._ahead = 0.0
        self._started = time.time()
        self._written = -1
        self._failed = False
        self._pid = os.getpid()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Write the file, and keep it until the process ends."""
        self._beat()
        self._ahead = self._clock_ahead()
        self._written = -1
        self._beat()
        if odd := clock_oddity(self._ahead):
            logger.warning(odd)
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Remove the file."""
        if os.getpid() != self._pid:  # a fork of the process it speaks of
            return
        atexit.unregister(self.stop)
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _keep(self) -> None:
        while not self._end.wait(self._beat_seconds):
            self._beat()

    def _beat(self) -> None:
        """Show a sign of life. That it cannot be shown, on a full disk for instance, must not end the work."""
        try:
            changes = activity.changes()
            if changes == self._written:
                os.utime(self._path)
            else:
                self._write(changes)
                self._written = changes
            self._failed = False
        except OSError as error:
            self._written = -1
            if not self._failed:
                self._failed = True
                logger.warning("%s: no sign of life can be given: %s", self._path, error.strerror)

    def _write(self, changes: int) -> None:
        now = activity.current()
        sign = Sign(
            self._role,
            self._rank,
            socket.gethostname(),
            self._pid,
            os.stat(self._run.root).st_ino,
            self._started - self._ahead,
            now.state,
            now.what,
            now.since - self._ahead,
            changes,
            os.environ.get(STEP, ""),
        )
        self._path.parent.mkdir(exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        # Not synced: after a crash of the host nobody asks what this process was doing.
        temporary.write_text(json.dumps({name: value for name, value in asdict(sign).items() if name != "beat"}))
        os.rename(temporary, self._path)

    def _clock_ahead(self) -> float:
        """Seconds by which this host's clock is ahead of the filesystem's."""
        try:
            os.utime(self._path)
            return time.time() - os.stat(self._path).st_mtime
        except OSError:
            return 0.0


def clock_oddity(ahead: float) -> str | None:
    """What to say of a host whose clock is so many seconds ahead of the filesystem's, if anything."""
    if abs(ahead) <= SKEW_SECONDS:
        return None
    return (
        f"the clock of {socket.gethostname()} is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of "
        "the filesystem: times in its logs and metrics are off by that; nothing else depends on it"
    )


def read_signs(run: RunDirectory) -> list[Sign]:
    """What every process of this very directory last said, living or not, by role and rank."""
    try:
        directory = os.stat(run.root).st_ino
        paths = sorted(run.status_folder.glob("*.json"))
    except OSError:
        return []
    signs = [sign for path in paths if (sign := _read(path)) and sign.directory == directory]
    return sorted(signs, key=lambda sign: (sign.role, sign.rank, sign.host, sign.pid))


def _read(path: Path) -> Sign | None:
    try:
        with open(path, encoding="utf-8") as file:  # NFS asks its server for a file that is opened, not for a path
            return Sign(**json.load(file), beat=os.fstat(file.fileno()).st_mtime)
    except (OSError, ValueError, TypeError):
        return None
