"""Signs of life that another process would leave."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from megatron_npd.files import write_json
from megatron_npd.run_directory import RunDirectory


def leave_sign(run: RunDirectory, role: str, host: str, pid: int, age: float = 0.0, **values: Any) -> Path:
    """What another process would leave, last heard of `age` seconds ago."""
    now = time.time() - age
    path = run.status(role, 0, host, pid)
    sign = {"role": role, "rank": 0, "host": host, "pid": pid, "directory": os.stat(run.root).st_ino, "started": now}
    write_json(path, sign | {"state": "working", "what": "its work", "since": now, "changes": 1} | values)
    os.utime(path, (now, now))
    return path
