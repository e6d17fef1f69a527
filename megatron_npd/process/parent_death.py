"""Processes that cannot outlive the one that started them, however that one dies (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from megatron_npd.process import stopping

_PR_SET_PDEATHSIG = 1
# Loaded here: between fork and exec a child must not load libraries.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with(parent: int) -> None:
    """Call in a child: the kernel kills it when the THREAD that started it ends. `parent`: process id it must have."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request
            os._exit(1)


def stay_until_death_of(parent: int) -> None:
    """Call in a child that serves its parent to the end: it dies with it, and is not stopped before. This module
    imports nothing large, because a spawned child imports it anew."""
    die_with(parent)
    stopping.ignore()
