"""One log format for every role, and reading the end of a log that somebody else writes."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

_TAIL_BYTES = 16384
_FAILED_TASK = re.compile(r"srun: error: \S+ tasks? (\d+)")


def configure_logging() -> None:
    """Log lines of this process to stderr, with time, level, and the rank where there are several."""
    rank = f"rank {os.environ['RANK']} " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s %(levelname)s {rank}%(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    logging.getLogger("megatron").setLevel(logging.WARNING)  # it says on each import what it found


def tail(path: Path, lines: int, start: int = 0) -> list[str]:
    """The last non-empty lines of a file, none from before byte `start`; [] if there is no file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = file.seek(max(start, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    # A progress bar rewrites its line with carriage returns: what it shows last counts.
    kept = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    if begin > start and len(kept) > 1:  # most likely in the middle of a line
        kept = kept[1:]
    return [line for line in kept if line.strip()][-lines:]


def first_failed_task(srun_log: Path, said: list[str]) -> Path | None:
    """The log of the task that srun says has failed first, or None. srun's own log is called NAME.srun.log."""
    ranks = (found.group(1) for line in said if (found := _FAILED_TASK.search(line)))
    rank = next(ranks, None)
    return None if rank is None else srun_log.with_name(srun_log.name.replace(".srun.log", f".rank{rank}.log"))
