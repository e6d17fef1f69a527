"""The processes of one role: started together, ended together, and what is remembered of how they ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from megatron_npd.errors import STORAGE_STATUS, USAGE_STATUS, storage_reason
from megatron_npd.supervise.children import Child, describe_exit, stop
from megatron_npd.supervise.restarts import Failure
from megatron_npd.supervise.role_work import Role

END_SECONDS = 5.0
"""How long the other ranks of a role may take to leave when one has failed: without it they can save nothing."""


class Crew:
    """The processes of a role now, and its failures so far."""

    def __init__(self, role: Role, environment: dict[str, str]):
        """`environment`: added to that of every process."""
        self.role = role
        self.children: list[Child] = []
        self.starts = 0
        self.failures: list[Failure] = []
        self.due: float | None = None
        """When a role that failed is to be started again, by `time.monotonic`."""
        self.given_up = False
        """It failed for good, and others of its kind go on."""
        self.idle_returns = 0
        """How often it exited on its own and was needed again at once, since it last made progress."""
        self._environment = environment
        self._returned_with = -1
        self._ended: dict[int, str] = {}  # process id -> why it was killed
        self._started = 0.0

    @property
    def running(self) -> list[Child]:
        """Its processes that have not ended."""
        return [child for child in self.children if child.poll() is None]

    @property
    def has_left(self) -> bool:
        """Whether it neither runs nor is about to. A process that failed after the last `failed()` call counts as
        failed, not as left."""
        return self.due is None and all(child.poll() == 0 for child in self.children)

    def start(self) -> None:
        """Start every process of the role.

        Raises:
            OSError: one cannot be started, or its log cannot be opened; those started before run.
        """
        self.due, self.children = None, []
        self.starts += 1
        self._started = time.monotonic()
        for command in self.role.commands():
            self.children.append(Child(replace(command, env=command.env | self._environment)))

    def note_return(self) -> int:
        """The role exited on its own and is needed: how often that happened without progress in between."""
        done = self._done()
        self.idle_returns = 1 if done != self._returned_with else self.idle_returns + 1
        self._returned_with = done
        return self.idle_returns

    def failed(self) -> list[Child]:
        """Its processes that ended with another status than 0, the likely cause first."""
        ended = [child for child in self.children if child.poll()]
        # Ranks that lose a peer fail as well, but of themselves and with status 1.
        return sorted(ended, key=lambda child: child.poll() > 0 and child.poll() not in (USAGE_STATUS, STORAGE_STATUS))

    def end(self, hurry: Callable[[], bool]) -> None:
        """End what is left of a crew one of whose processes has failed."""
        stop(self.running, END_SECONDS, hurry)

    def kill(self, child: Child, reason: str) -> None:
        """End a process of this crew; `reason` in words that follow its name."""
        self._ended[child.pid] = reason
        child.kill()

    def note_failure(self, cause: Child | OSError) -> Failure:
        """Remember a failure: of a process, or of starting one."""
        if isinstance(cause, OSError):
            how, status = f"{self.role.name} could not be started: {storage_reason(cause)}", STORAGE_STATUS
        else:
            status = cause.poll() or 0
            how = f"{cause.command.name} {self._ended.pop(cause.pid, None) or describe_exit(status)}"
        now = time.monotonic()
        failure = Failure(now, self._done(), f"{how}, {now - self._started:.0f} s after its start", status)
        self.failures.append(failure)
        return failure

    @property
    def refuses(self) -> bool:
        """Whether the newest failure was a refusal: the same input is refused again."""
        return bool(self.failures) and self.failures[-1].status == USAGE_STATUS

    def _done(self) -> int:
        try:
            return self.role.done()
        except OSError:  # the filesystem may be what failed
            return self.failures[-1].done if self.failures else 0
