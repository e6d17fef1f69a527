"""Waiting for processes that work as one: if one fails or all hang, each says what it did and where it was."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

STACKS = {"PYTHONFAULTHANDLER": "1"}
"""In a rank's environment: asked to abort, it says where each of its threads is."""
LEAVE_SECONDS = 20.0


def wait_for_ranks(ranks: list[subprocess.Popen[str]], logs: list[Path], seconds: float) -> None:
    """Return when all ranks ended well; none is left running whatever happens.

    `logs`: what each writes its output to (a pipe that nobody reads would stop it when it is full).
    """
    until = time.monotonic() + seconds
    try:
        while (left := [rank for rank in ranks if rank.poll() is None]) and time.monotonic() < until:
            if any(rank.returncode for rank in ranks):  # the others would wait for it, for half an hour
                break
            time.sleep(0.05)
        if left and time.monotonic() >= until:
            for rank in left:
                rank.send_signal(signal.SIGABRT)
            for rank in left:
                rank.wait(LEAVE_SECONDS)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    said = [
        f"rank {n}, status {r.returncode}:\n{log.read_text()[-6000:]}"
        for n, (r, log) in enumerate(zip(ranks, logs, strict=True))
    ]
    assert not any(rank.returncode for rank in ranks), "\n".join(said)
