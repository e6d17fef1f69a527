"""Waiting that explains itself, and turns on a machine with too few cores."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from megatron_npd.config import Config
from megatron_npd.hardware.host import cores
from megatron_npd.process.activity import waiting
from megatron_npd.run_directory import RunDirectory

T = TypeVar("T")
logger = logging.getLogger(__name__)
SAY_AGAIN_SECONDS = 30.0
SHORTEST_PAUSE_SECONDS = 0.005


def wait_for(what: str, look: Callable[[], T | None], poll_seconds: float = 0.2) -> T:
    """Call `look` until it returns something; say what is waited for, in the log (`explained`) and to `npd status`.

    `poll_seconds`: the longest pause between two looks (`Pace`).
    """
    found = look()
    if found is not None:
        return found
    pace = Pace(poll_seconds)
    with explained(what) as still:
        while found is None:
            pace.sleep()
            still()
            found = look()
    return found


class Pace:
    """How long to sleep between two looks: briefly at first, for what was nearly there, then up to `longest` seconds.

    Whatever the wait, it is noticed at its end at most a third too late, and a long one looks as seldom as it should.
    """

    def __init__(self, longest: float):
        self._longest = longest
        self._next = min(SHORTEST_PAUSE_SECONDS, longest)

    def sleep(self, most: float = math.inf) -> None:
        """Sleep until it is time to look again, at most `most` seconds."""
        time.sleep(min(self._next, most))
        self._next = min(self._next * 4 / 3, self._longest)


@contextlib.contextmanager
def explained(what: str) -> Iterator[Callable[[], None]]:
    """Say that this process waits: at once, every 30 s as long as the function is called that is yielded, and at the
    end of a wait that took as long."""
    since, reminder = time.monotonic(), Reminder()
    logger.info("waiting for %s", what)
    with waiting(what):
        yield lambda: reminder.still(what)
    if reminder.has_said:
        logger.info("waited %.0f s for %s", time.monotonic() - since, what)


class Reminder:
    """Says in the log, every 30 s and only if asked so often, that somebody still waits. For any thread."""

    def __init__(self) -> None:
        self._since = self._said = time.monotonic()

    @property
    def has_said(self) -> bool:
        """Whether it took long enough to be said."""
        return self._said > self._since

    def still(self, what: str) -> None:
        """Call again and again while waiting for `what`."""
        now = time.monotonic()
        if now - self._said > SAY_AGAIN_SECONDS:
            self._said = now
            logger.info("still waiting for %s, since %.0f s", what, now - self._since)


@contextlib.contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """Compute while no other role of this machine does. The kernel drops the lock of a killed process.

    `lock` None: roles compute at the same time. The lock is for speed alone: two workers that share two cores
    thrash each other's caches; nothing is wrong if it does not hold (say, on a filesystem without flock).
    """
    if lock is None:
        yield
        return
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with waiting("its turn to compute"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def turn_lock(config: Config, run: RunDirectory) -> Path | None:
    """The lock roles take turns by, or None where they may compute side by side."""
    return run.turn if takes_turns(config) else None


def takes_turns(config: Config) -> bool:
    """Whether only one role of this machine computes at a time (`launch.turns`)."""
    wanted = (
        config.rollout.threads
        + config.annotator.threads * config.annotator.tensor_model_parallel_size
        + config.training.threads * config.training.world_size
    )
    crowded = wanted > cores()
    return config.launch.turns == "on" or (config.launch.turns == "auto" and crowded)
