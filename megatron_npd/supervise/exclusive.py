"""One supervisor a run directory: on one host by a lock, over hosts, where locks may not reach, by signs of life."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from megatron_npd.buffer.leases import filesystem_time
from megatron_npd.errors import UserError
from megatron_npd.process.heartbeat import BEAT_SECONDS, QUIET_SECONDS, Heartbeat, Sign, read_signs
from megatron_npd.roles import SUPERVISOR
from megatron_npd.run_directory import RunDirectory

LISTEN_SECONDS = 4 * BEAT_SECONDS
"""A living process is heard of well within this time."""


@contextlib.contextmanager
def only_supervisor(run: RunDirectory, listen_seconds: float = LISTEN_SECONDS) -> Iterator[None]:
    """Be the one supervisor of a run directory within the block, and give signs of life.

    Raises:
        UserError: another one works there.
    """
    with open(run.supervisor_lock, "a+") as lock:
        _take(lock, run)
        # Announce first, then look: two that start at once see each other.
        with Heartbeat(run, SUPERVISOR):
            _refuse_beside_another_host(run, listen_seconds)
            yield


def _take(lock: TextIO, run: RunDirectory) -> None:
    """Hold the lock for as long as the file is open; the kernel drops it when this process ends, however it ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        raise UserError(f"run_directory = {run.root}: process {holder} already runs it; one at a time") from None
    except OSError as error:
        print(f"npd: {lock.name}: this filesystem has no locks ({error.strerror}); nothing refuses a second `npd run` "
              "on this host", file=sys.stderr)  # fmt: skip
    lock.truncate(0)
    lock.write(f"{os.getpid()} of {socket.gethostname()}\n")
    lock.flush()


def _refuse_beside_another_host(run: RunDirectory, listen_seconds: float) -> None:
    """A supervisor of another host that was killed looks like one that lives, until its next beat is missing."""
    before = _others(run)
    now = filesystem_time(run.root)
    recent = [sign for sign in before if now - sign.beat < QUIET_SECONDS]
    if not recent:
        return
    print(f"npd: listening whether {_named(recent[0])} is still alive", file=sys.stderr)
    until = time.monotonic() + listen_seconds
    beats = {(sign.host, sign.pid): sign.beat for sign in before}
    while time.monotonic() < until:
        time.sleep(min(0.5, listen_seconds))
        for sign in _others(run):
            if sign.beat != beats.get((sign.host, sign.pid)):
                raise UserError(f"run_directory = {run.root}: {_named(sign)} already runs it; one at a time")


def _others(run: RunDirectory) -> list[Sign]:
    return [sign for sign in read_signs(run) if sign.role == SUPERVISOR and sign.host != socket.gethostname()]


def _named(sign: Sign) -> str:
    return f"process {sign.pid} of {sign.host}"
