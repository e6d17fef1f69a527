"""Waiting that explains itself, and turns on a machine with too few cores."""

from __future__ import annotations

import contextlib
import fcntl
import logging
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


def wait_for(what: str, look: Callable[[], T | None], poll_seconds: float = 0.2) -> T:
    """Call `look` until it returns something; say what is waited for, in the log (`explained`) and to `npd status`."""
    found = look()
    if found is not None:
        return found
    with explained(what) as still:
        while found is None:
            time.sleep(poll_seconds)
            still()
            found = look()
    return found


@contextlib.contextmanager
def explained(what: str) -> Iterator[Callable[[], None]]:
    """Say that this process waits: at once, every 30 s as long as the function is called that is yielded, and at the
    end of a wait that took as long."""
    since = said = time.monotonic()

    def still() -> None:
        nonlocal said
        if time.monotonic() - said > SAY_AGAIN_SECONDS:
            said = time.monotonic()
            logger.info("still waiting for %s, since %.0f s", what, said - since)

    logger.info("waiting for %s", what)
    with waiting(what):
        yield still
    if said > since:
        logger.info("waited %.0f s for %s", time.monotonic() - since, what)


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
