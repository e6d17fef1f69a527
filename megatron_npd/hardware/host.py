"""What this machine gives this process: cores and memory, within what a container or a batch system allows. Linux."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    total: int
    """Of this machine, or the limit of this process's control group where that is lower."""
    available: int
    """What new processes can take of it now, without the kernel's killing or swapping any."""
    swap: int
    """What lies beyond it on a disk. Slow, but it does not kill."""


def cores(root: Path = ROOT) -> int:
    """Cores this process may use: those it is bound to (`taskset`, Slurm, a container), within its group's quota.

    `os.cpu_count()` says what the machine has, whoever may use it.
    """
    return max(1, min([len(os.sched_getaffinity(0)), *_quotas(root)]))


def memory(root: Path = ROOT) -> Memory:
    """Raises OSError: /proc does not say (no Linux)."""
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    total, available = 1024 * kib["MemTotal"], 1024 * kib.get("MemAvailable", kib["MemFree"])
    for limit, used in _memory_limits(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return Memory(total, available, 1024 * kib.get("SwapTotal", 0))


def _quotas(root: Path) -> Iterator[int]:
    """Whole cores of processor time that this process's control groups allow."""
    for folder in _control_groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):  # "max": no quota
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            yield quota // period
        with contextlib.suppress(OSError, ValueError):
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0:  # -1: none
                yield quota // period


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, what is used of it and cannot be taken back) of this process's control groups, bytes."""
    for folder in _control_groups(root, "memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):  # "max": no limit
                most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
                yield most, taken - _statistic(folder / "memory.stat", cache)


def _statistic(file: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """This process's control group and all around it: of version 2, and of version 1's tree of a controller.

    Inside a container the path may be the host's; the group of the container is then what is mounted as the root.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / (controller if controllers else "")
            folder = mount / path.lstrip("/")
            yield from (group for group in (folder, *folder.parents) if group == mount or mount in group.parents)
