"""Leases of processes that are gone: returned at once instead of after `launch.lease_seconds`.

Only those of this machine, since only its processes can be looked for. Returning one too many does no harm: a lease
saves double work, nothing else depends on it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from megatron_npd.run_directory import RunDirectory, read_json


def return_stale_leases(run: RunDirectory) -> int:
    """Remove the leases that dead processes of this machine held; returns how many."""
    returned = 0
    for path in sorted(run.lease("any", "stage", 0).parents[2].glob("*/*/unit_*.json")):
        if _is_stale(path):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                returned += 1
    return returned


def _is_stale(path: Path) -> bool:
    try:
        holder = read_json(path)
        return holder["host"] == socket.gethostname() and not _is_alive(int(holder["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False  # just being written or returned, or of a kind we do not know: it expires


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
