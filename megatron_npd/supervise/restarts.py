"""When a role that failed is started again, and when it is not: a pure function of how it failed so far.

Two failures belong together when the role got no further between them and they are at most
`launch.restart_window_seconds` apart. "Further" is measured by what is in the run directory: a role that fails now and
then and gets its work done goes on without end; one that fails at the same place again and again is a crash loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_npd.config import LaunchConfig
from megatron_npd.errors import STORAGE_STATUS


@dataclass(frozen=True)
class Failure:
    """One end of a role that was not wanted."""

    time: float
    """When, seconds of any clock that only goes forward."""
    done: int
    """What the role had done by then (`roles.Role.done`)."""
    how: str
    """In words: `trainer was ended by SIGKILL (out of memory?) after 12 s`."""
    status: int = 1
    """Of the process that failed first, as `subprocess` gives it."""


def related(failures: Sequence[Failure], launch: LaunchConfig) -> list[Failure]:
    """The newest failures that belong together; `failures` in the order of time, at least one."""
    newest = failures[-1]
    before = [failure.done for failure in failures]
    # The role made progress after a failure when a later one saw more done than any up to then.
    start = len(failures) - 1
    while start and max(before[start:]) <= max(before[:start]):
        start -= 1
    return [failure for failure in failures[start:] if newest.time - failure.time <= launch.restart_window_seconds]


def delay_before_restart(failures: Sequence[Failure], launch: LaunchConfig) -> float | None:
    """Seconds from the newest failure until the role is started again; None: it is a crash loop."""
    count = len(related(failures, launch))
    if count > launch.max_restarts:
        return None
    longest = launch.longest_restart_delay_seconds
    if failures[-1].status == STORAGE_STATUS:  # only time can help
        return longest
    return min(launch.restart_delay_seconds * 2.0 ** min(count - 1, 60), longest)
