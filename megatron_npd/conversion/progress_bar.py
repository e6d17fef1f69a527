"""What a conversion tells while it runs and when it is done."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from tqdm import tqdm

PLAIN_SECONDS = 10.0
SAMPLE_SECONDS = 0.005
"""A conversion takes its memory in short peaks: how often it is looked at."""


@dataclass(frozen=True)
class Report:
    """What was done, by this process alone: what an interrupted one had done before is not counted."""

    tensors: int
    nbytes: int
    """Of the tensors written."""
    seconds: float
    peak_bytes: int
    """Most memory at one time, files that are mapped left out."""
    tensors_found: int
    """Written before an interruption."""

    def __str__(self) -> str:
        found = f", {self.tensors_found} more were there" if self.tensors_found else ""
        rate, memory = self.nbytes / 1e6 / self.seconds, self.peak_bytes / 1e9
        return (
            f"{self.tensors} tensors{found}, {self.nbytes / 1e9:.2f} GB in {self.seconds:.1f} s, {rate:.0f} MB/s, "
            f"peak memory beyond the page cache {memory:.2f} GB"
        )


class ProgressBar:
    """Counts tensors and bytes: a bar where a person watches, else a line now and then."""

    def __init__(self, title: str, total_bytes: int):
        self.tensors = self.nbytes = self.tensors_found = 0
        self._title, self._total, self._skipped = title, total_bytes, 0
        self._started = self._said = time.monotonic()
        live = sys.stderr.isatty()
        self._bar = tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True) if live else None

    def wrote(self, nbytes: int) -> None:
        """A tensor was handed to the writer."""
        self.tensors += 1
        self.nbytes += nbytes
        self._show(nbytes)

    def found(self, tensors: int, nbytes: int) -> None:
        """Some were there already."""
        self.tensors_found += tensors
        self._skipped += nbytes
        self._show(nbytes)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def report(self, peak_bytes: int) -> Report:
        seconds = time.monotonic() - self._started
        return Report(self.tensors, self.nbytes, seconds, peak_bytes, self.tensors_found)

    def _show(self, nbytes: int) -> None:
        if self._bar is not None:
            self._bar.update(nbytes)
        elif time.monotonic() - self._said > PLAIN_SECONDS:
            self._said = time.monotonic()
            rate = self.nbytes / 1e6 / (self._said - self._started)
            done = (self.nbytes + self._skipped) / 1e9
            print(f"{self._title}: {done:.1f} of {self._total / 1e9:.1f} GB, {rate:.0f} MB/s", file=sys.stderr)
