"""Cores and memory that this process may use, in containers and batch jobs of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_npd.hardware.host import Memory, cores, memory

MIB = 2**20


def system(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A tree as below `/`: 8 GiB of memory, 6 of them available, and 1 of swap; `files` below /sys/fs/cgroup."""
    kib = {"MemTotal": 8 * 2**20, "MemFree": 2**20, "MemAvailable": 6 * 2**20, "SwapTotal": 2**20}
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("".join(f"{name}:   {value} kB\n" for name, value in kib.items()))
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


GROUPS = {
    "no limit": ("0::/a\n", {"a/memory.max": "max\n", "a/cpu.max": "max 100000\n"}, 8192, 6144, None),
    "no control groups": ("", {}, 8192, 6144, None),
    "version 2": (
        "0::/job/task\n",
        {
            "job/task/memory.max": "max\n",
            "job/memory.max": f"{3000 * MIB}\n",
            "job/memory.current": f"{1000 * MIB}\n",
            "job/memory.stat": f"anon 1\nactive_file 2\ninactive_file {400 * MIB}\n",
            "job/cpu.max": "150000 100000\n",
        },
        3000,
        2400,
        1,
    ),
    "version 1 in a container, whose path is the host's": (
        "4:memory:/docker/1234\n2:cpu,cpuacct:/docker/1234\n1:name=systemd:/\n",
        {
            "memory/memory.limit_in_bytes": f"{2000 * MIB}\n",
            "memory/memory.usage_in_bytes": f"{500 * MIB}\n",
            "memory/memory.stat": f"total_inactive_file {100 * MIB}\n",
            "cpu/cpu.cfs_quota_us": "50000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
        2000,
        1600,
        1,
    ),
    "version 1 without limits": (
        "4:memory:/\n2:cpu:/\n",
        {
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "12345\n",
            "cpu/cpu.cfs_quota_us": "-1\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
        8192,
        6144,
        None,
    ),
    "full": ("0::/\n", {"memory.max": f"{MIB}\n", "memory.current": f"{2 * MIB}\n"}, 1, 0, None),
}


@pytest.mark.parametrize("name", GROUPS)
def test_what_a_control_group_allows(name: str, tmp_path: Path) -> None:
    cgroup, files, total, available, quota = GROUPS[name]
    root = system(tmp_path, cgroup, files)
    assert memory(root) == Memory(total * MIB, available * MIB, swap=1024 * MIB)
    bound = len(os.sched_getaffinity(0))
    assert cores(root) == (bound if quota is None else min(bound, quota))


def test_a_process_that_is_bound_to_one_core_has_one() -> None:
    one = min(os.sched_getaffinity(0))
    bound = f"import os; os.sched_setaffinity(0, [{one}]); from megatron_npd.hardware.host import cores; print(cores())"
    assert subprocess.run([sys.executable, "-c", bound], capture_output=True, text=True).stdout == "1\n"


def test_this_machine_has_memory() -> None:
    here = memory()
    assert 0 < here.available <= here.total
