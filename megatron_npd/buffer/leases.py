"""Leases: at most one worker at a time on a unit of work, over a plain shared filesystem.

A lease is a file created exclusively; its holder touches it while it works; one that nobody touched for
`lease_seconds` is taken over. A lease only saves double work: what keeps redone work out is that a unit has one
file name, and that its content is a function of its identity.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def lease(path: Path, lease_seconds: float) -> Iterator[bool]:
    """Yield True while this process holds the lease, kept alive from a thread; False if another holds it."""
    if not _claim(path, lease_seconds):
        yield False
        return
    done = threading.Event()
    keeper = threading.Thread(target=_keep_alive, args=(path, lease_seconds / 4, done), daemon=True)
    keeper.start()
    try:
        yield True
    finally:
        done.set()
        keeper.join()
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _claim(path: Path, lease_seconds: float) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if time.time() - path.stat().st_mtime > lease_seconds:
            _take_over(path)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}, file)
    return True


def _take_over(path: Path) -> None:
    """Remove an expired lease; of several that try, the rename lets one through."""
    expired = path.with_name(f".{path.name}.expired.{socket.gethostname()}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, expired)
        expired.unlink()


def _keep_alive(path: Path, interval: float, done: threading.Event) -> None:
    while not done.wait(interval):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
