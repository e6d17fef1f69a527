"""Leases: at most one worker at a time on a unit of work, over a plain shared filesystem.

A lease is a file created exclusively; its holder touches it while it works; one that nobody touched for
`lease_seconds` is taken over. Only what NFS and Lustre have is used: exclusive creation, rename, modification times.
Ages are differences of two times that the filesystem itself gave, so clocks of hosts may disagree.

A lease only saves double work: a holder that is stopped for long and then goes on finds its lease lost, if it looks
(`Lease.is_held`), and cannot do harm if it does not: a unit's shard is created once and never replaced.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)


class Lease:
    """A lease this process took; it may be lost while it works."""

    def __init__(self, path: Path, file: TextIO):
        self.path = path
        self._file = file  # open, so that its inode is nobody else's even when the file is removed

    def is_held(self) -> bool:
        """Whether the lease file is still the one this process created."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def touch(self) -> bool:
        """Show a sign of life; False if the lease is lost. The filesystem's own clock gives the time."""
        if not self.is_held():
            return False
        os.utime(self._file.fileno())
        return True

    def give_back(self) -> None:
        """Remove the lease, unless it is another's by now."""
        if self.is_held():
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        self._file.close()


@contextlib.contextmanager
def lease(path: Path, lease_seconds: float) -> Iterator[Lease | None]:
    """Yield a lease that a thread keeps alive until the block ends; None if another worker holds it."""
    held = claim(path, lease_seconds)
    if held is None:
        yield None
        return
    done = threading.Event()
    keeper = threading.Thread(target=_keep_alive, args=(held, lease_seconds / 4, done), daemon=True)
    keeper.start()
    try:
        yield held
    finally:
        done.set()
        keeper.join()
        held.give_back()


def claim(path: Path, lease_seconds: float) -> Lease | None:
    """Take a lease that is free or expired; None if another worker holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(path)
        age = filesystem_time(path.parent) - found.st_mtime
        if age > lease_seconds:
            logger.warning("%s: no sign of life for %.0f s; taken over from %s", path, age, _holder(path))
            _remove(path, found)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    file = os.fdopen(descriptor, "w")
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}, file)
    file.flush()
    return Lease(path, file)


def is_free(path: Path, lease_seconds: float) -> bool:
    """Whether nobody holds a lease: it is not there, or expired."""
    try:
        found = os.stat(path)
        return filesystem_time(path.parent) - found.st_mtime > lease_seconds
    except FileNotFoundError:
        return True


def filesystem_time(folder: Path) -> float:
    """Now by the clock that stamps files in `folder`, seconds since the epoch: a file server's is not this host's."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime


def _remove(path: Path, expired: os.stat_result) -> None:
    """Remove the lease file that was seen expired, and no other: it may have been touched or replaced since."""
    aside = path.with_name(f".{path.name}.expired.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    found = os.stat(aside)
    if (found.st_ino, found.st_mtime_ns) != (expired.st_ino, expired.st_mtime_ns):
        with contextlib.suppress(OSError):  # back to its place; if that is taken again, its holder finds it lost
            os.link(aside, path)
    aside.unlink()


def _holder(path: Path) -> str:
    try:
        text = json.loads(path.read_text())
        return f"process {text['pid']} of {text['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown holder"


def _keep_alive(held: Lease, interval: float, done: threading.Event) -> None:
    while not done.wait(interval):
        try:
            if not held.touch():
                logger.warning("%s: lost: another worker took it over while this one was stopped", held.path)
                return
        except OSError as error:  # the filesystem may come back before the lease expires
            logger.warning("%s: cannot be touched: %s", held.path, error)
