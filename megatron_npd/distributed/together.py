"""Waiting and stopping as one: what the ranks of a role must agree on, or one goes on and the others wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from megatron_npd.distributed.collectives import broadcast_object, greatest
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.process import stopping
from megatron_npd.process.waiting import Pace, explained

T = TypeVar("T")

TOUCH_SECONDS = 1.0
"""Ranks hear of each other at least so often while they wait: a collective that one rank enters hours after the others
would time out, and a request to stop would not be heard."""


def wait_together(parallel: Parallel, what: str, look: Callable[[], T | None], poll_seconds: float = 0.2) -> T:
    """`process.waiting.wait_for` on the first rank, which alone calls `look`; every rank gets what it found (pickled).

    Raises:
        Stopped: on every rank, if any rank was asked to stop while requests are deferred.
    """
    found = _agree(look() if parallel.rank == 0 else None, parallel)
    if found is not None:
        return found
    pace = Pace(poll_seconds)
    with explained(what) as still:
        while found is None:
            mine = _look_for(look, pace) if parallel.rank == 0 else None
            still()
            found = _agree(mine, parallel)
    return found


def leave_if_asked(parallel: Parallel) -> None:
    """Call on every rank, at a place where this role can stop.

    Raises:
        Stopped: on every rank, if any rank was asked to stop; a signal reaches ranks at different moments.
    """
    (number,) = greatest([stopping.requested()], parallel)
    if number:
        raise stopping.Stopped(number)


def _agree(found: T | None, parallel: Parallel) -> T | None:
    leave_if_asked(parallel)
    return broadcast_object(found) if parallel.world_size > 1 else found


def _look_for(look: Callable[[], T | None], pace: Pace) -> T | None:
    """Look for some time, shorter when this rank was asked to stop."""
    until = time.monotonic() + TOUCH_SECONDS
    while time.monotonic() < until and not stopping.requested():
        pace.sleep(TOUCH_SECONDS)
        if (found := look()) is not None:
            return found
    return None
