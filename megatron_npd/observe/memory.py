"""How much memory a process takes, and the most it ever took. Linux; no torch.

Counted is what the kernel cannot take back: anonymous memory (malloc, torch, Python) and shared memory that the process
has mapped. Files that are mapped, such as a checkpoint being loaded, lie in the page cache and are not counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

PERIOD_SECONDS = 0.05


def private_bytes() -> int:
    """Memory of this process now, bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        sizes = {name: value for name, _, value in (line.partition(":") for line in status)}
    return 1024 * sum(int(sizes.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem"))


class PeakMemory:
    """Watches this process from now on, in a thread that looks 20 times a second: a shorter peak may be missed.

    Args:
        device_peak: bytes of a GPU's memory taken at most so far, by who knows it; None: no GPU.
    """

    def __init__(self, device_peak: Callable[[], int | None] = lambda: None):
        self.imported = self._peak = private_bytes()
        """What the process took when it began to be watched: a role has imported its libraries then, and no more."""
        self._device_peak = device_peak
        threading.Thread(target=self._watch, name="peak memory", daemon=True).start()

    def record(self) -> dict[str, int]:
        """The fields of a `memory` event."""
        self._look()
        figures = {"peak_bytes": self._peak, "imported_bytes": self.imported, "device_peak_bytes": self._device_peak()}
        return {name: value for name, value in figures.items() if value is not None}

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(PERIOD_SECONDS):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, private_bytes())
