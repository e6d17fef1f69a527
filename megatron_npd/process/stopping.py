"""Requests to stop: SIGTERM, SIGINT, and SIGUSR1, by which a batch system says that the time limit is near.

A role that may leave anywhere leaves at once, by an exception, so that it unwinds and returns its leases. One that has
something to save first defers requests, and asks for them (`requested`) where it can leave.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AGAIN_SECONDS = 5.0
"""A request repeated sooner does not interrupt the unwinding after the first; a later one finds that it was lost where
Python swallows exceptions, in a destructor."""


class Stopped(SystemExit):
    """This process was asked to stop, and ends with status 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


_requested = 0
_deferred = False
_raised = -AGAIN_SECONDS


def install() -> None:
    """Take requests from now on. Call from the main thread."""
    for number in SIGNALS:
        signal.signal(number, _on_signal)


def ignore() -> None:
    """Leave requests to the process that started this one, and that needs it to end in order."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def requested() -> int:
    """Number of the first signal that asked this process to stop, 0 if none has."""
    return _requested


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within the block a request is only noted."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _requested, _raised
    _requested = _requested or number
    if not _deferred and time.monotonic() - _raised > AGAIN_SECONDS:
        _raised = time.monotonic()
        raise Stopped(number)
