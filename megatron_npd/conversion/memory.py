"""This process's memory: how much it takes, and that it is used again."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

_SAMPLE_SECONDS = 0.005
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def reuse_freed_memory() -> None:
    """Let malloc keep freed memory for the rest of the process, and give large tensors none of their own.

    By default every large tensor gets fresh pages, each of which the kernel must clear: a third of a conversion's
    processor time. glibc only; elsewhere nothing changes.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(parameter, value)


class MemoryPeak:
    """The most anonymous memory this process had within a block: RssAnon of /proc/self/status, sampled.

    Pages of mapped files are left out: they are the page cache's, and leave when somebody else needs the memory. The
    kernel keeps a high-water mark (VmHWM) only of both together.
    """

    def __init__(self) -> None:
        self.nbytes: int | None = _anonymous_bytes()
        self._done = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[MemoryPeak]:
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()

    def _watch(self) -> None:
        while self.nbytes is not None and not self._done.wait(_SAMPLE_SECONDS):
            self.nbytes = max(self.nbytes, _anonymous_bytes() or 0)


def _anonymous_bytes() -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return None
