"""One log format for every role, and reading the end of a log that somebody else writes."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

_PREFIX = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(,\d+)? [A-Z]+ (rank \d+ )?")
_TAIL_BYTES = 16384


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
            file.seek(max(start, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    # A progress bar rewrites its line with carriage returns: what it shows last counts.
    kept = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in kept if line.strip()][-lines:]


def last_message(path: Path, start: int = 0) -> str:
    """The newest log line without time and level, or an empty string; what libraries print is passed over."""
    ours = (line for line in reversed(tail(path, 50, start)) if _PREFIX.match(line))
    return _PREFIX.sub("", next(ours, "")).strip()
