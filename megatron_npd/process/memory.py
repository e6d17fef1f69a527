"""How much memory a process takes, the most it ever took, and keeping what it does not use small. Linux; no torch.

Counted is what the kernel cannot take back: anonymous memory (malloc, torch, Python) and shared memory that the process
has mapped. Files that are mapped, such as a checkpoint being loaded, lie in the page cache and are not counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

PERIOD_SECONDS = 0.05
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # of mallopt(3)


def private_bytes() -> int:
    """Memory of this process now, bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        sizes = {name: value for name, _, value in (line.partition(":") for line in status)}
    return 1024 * sum(int(sizes.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem"))


def steady_heap() -> None:
    """Let large tensors go back to the kernel when they are freed; for a process that computes on its CPUs.

    glibc raises, from what a process frees, the size from which an allocation is a mapping of its own. Buffers of 30 MB
    then share the heap with small ones, and leave holes: a fifth of what a trainer takes (measured). Fixing the size
    costs no time: below 16 MB memory is reused as before.
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_THRESHOLD, 16 * 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 256 * 2**20)


def release_unused() -> None:
    """Give back to the kernel what was freed and malloc keeps. Takes milliseconds; what is needed again costs a page
    fault per page, so not for every step."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reuse_freed_memory() -> None:
    """Let malloc keep freed memory for the rest of the process, and give large tensors none of their own.

    By default every large tensor gets fresh pages, each of which the kernel must clear: a third of a conversion's
    processor time.
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(parameter, value)


class PeakMemory:
    """Watches this process from now on, in a thread that looks now and then: a shorter peak may be missed.

    A context manager, for whom only a block's peak matters: leaving it ends the watch.

    Args:
        device_peak: bytes of a GPU's memory taken at most so far, by who knows it; None: no GPU.
        period_seconds: between two looks.
    """

    def __init__(self, device_peak: Callable[[], int | None] = lambda: None, period_seconds: float = PERIOD_SECONDS):
        self._peak = private_bytes()
        self._device_peak = device_peak
        self._period_seconds = period_seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak memory", daemon=True)
        self._thread.start()

    @property
    def nbytes(self) -> int:
        """Most bytes so far."""
        return self._peak

    def record(self) -> dict[str, int]:
        """Most bytes so far: the fields of a `memory` event."""
        self._look()
        of_device = self._device_peak()
        return {"peak_bytes": self._peak} | ({} if of_device is None else {"device_peak_bytes": of_device})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(self._period_seconds):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, private_bytes())
