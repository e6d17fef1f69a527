"""What killed processes leave in a run directory: leases, signs of life, files and folders they were writing.

Leases and signs of life of this machine's processes are removed as soon as these are gone: only here they can be looked
for. Returning one lease too many does no harm: a lease saves double work, nothing else depends on it. What was being
written has no name of its process, and is left alone until nobody has touched it for an hour.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_npd.buffer.leases import filesystem_time
from megatron_npd.files import read_json
from megatron_npd.process.heartbeat import QUIET_SECONDS, read_signs
from megatron_npd.run_directory import RunDirectory

ABANDONED_SECONDS = 3600.0
_UNFINISHED = re.compile(r"\..+\.tmp|\.staging-.+|\..+\.expired\..+")
"""Names of files and folders that get another name, or none, when they are done."""


def return_stale_leases(run: RunDirectory) -> int:
    """Remove the leases of this machine's dead processes, and of those that have become silent; returns how many."""
    returned = 0
    paths = sorted(run.leases.glob("*/*/unit_*.json"))
    silent = _silent(run) if paths else set()
    for path in paths:
        if _is_stale(path, silent):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                returned += 1
    return returned


def remove_dead_signs(run: RunDirectory) -> None:
    """Remove the signs of life of this machine's dead processes, and of all that were last heard of an hour ago."""
    now, here = filesystem_time(run.root), socket.gethostname()
    for sign in read_signs(run):
        if now - sign.beat > ABANDONED_SECONDS or (sign.host == here and not is_alive(sign.pid)):
            run.status(sign.role, sign.rank, sign.host, sign.pid).unlink(missing_ok=True)


def remove_unfinished(run: RunDirectory) -> int:
    """Remove what was being written and has not been touched for an hour; returns how many files and folders."""
    now, removed = filesystem_time(run.root), 0
    for path in _unfinished(run):
        with contextlib.suppress(FileNotFoundError):
            if now - _last_touched(path) > ABANDONED_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed += 1
    return removed


def is_alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _unfinished(run: RunDirectory) -> Iterator[Path]:
    """In every folder of the run, but not below what is unfinished itself."""
    for folder, folders, files in os.walk(run.root):
        found = [name for name in (*folders, *files) if _UNFINISHED.fullmatch(name)]
        folders[:] = [name for name in folders if name not in found]
        yield from (Path(folder) / name for name in found)


def _last_touched(path: Path) -> float:
    """Newest modification time of a file, or of a folder and everything below it."""
    inside = [Path(folder) / name for folder, folders, files in os.walk(path) for name in (*folders, *files)]
    return max(each.stat().st_mtime for each in (path, *inside))


def _silent(run: RunDirectory) -> set[tuple[str, int]]:
    """Host and process id of those that gave signs of life and do so no more."""
    now = filesystem_time(run.root)
    return {(sign.host, sign.pid) for sign in read_signs(run) if now - sign.beat > QUIET_SECONDS}


def _is_stale(path: Path, silent: set[tuple[str, int]]) -> bool:
    try:
        holder = read_json(path)
        host, pid = holder["host"], int(holder["pid"])
        return (host, pid) in silent or (host == socket.gethostname() and not is_alive(pid))
    except (OSError, ValueError, KeyError, TypeError):
        return False  # just being written or returned, or of a kind we do not know: it expires
