"""What this process is doing, and since when: the answer to "why does nothing happen?".

A role says what it does where it does it (`doing`, `waiting`, `progress`); `heartbeat` tells everybody else. Belongs to
the main thread: what threads in the background do is part of what it waits for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

WORKING, WAITING = "working", "waiting"


@dataclass(frozen=True)
class Activity:
    """What a process does from one moment on."""

    what: str
    """In words that follow its name: `generating round_0001, unit 3 of 8`; of waiting, what for."""
    state: str
    """WORKING or WAITING."""
    since: float = field(default_factory=time.time)
    """When it began, Unix seconds of this host's clock."""


_current = Activity("starting", WORKING)
_changes = 0


def current() -> Activity:
    """What this process is doing."""
    return _current


def changes() -> int:
    """How often something was begun, ended or made progress: a number that stands still while a process hangs."""
    return _changes


def progress() -> None:
    """Say that the present activity made progress. Costs next to nothing: call it on every step of an inner loop."""
    global _changes
    _changes += 1


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Work on something for as long as the block lasts."""
    with _activity(Activity(what, WORKING)):
        yield


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Wait for something for as long as the block lasts."""
    with _activity(Activity(what, WAITING)):
        yield


@contextlib.contextmanager
def _activity(activity: Activity) -> Iterator[None]:
    global _current
    before, _current = _current, activity
    progress()
    try:
        yield
    finally:
        _current = before
        progress()
