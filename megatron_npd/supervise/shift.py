"""What the supervisor does at each look: restarts, hangs, roles that are needed again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

from megatron_npd.config import LaunchConfig
from megatron_npd.errors import NODE_LOST_STATUS, USAGE_STATUS, storage_reason
from megatron_npd.process.logs import first_failed_task, tail
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import Event
from megatron_npd.supervise.children import Child
from megatron_npd.supervise.console import Console
from megatron_npd.supervise.crew import Crew
from megatron_npd.supervise.guardian import Guardian
from megatron_npd.supervise.journal import Journal
from megatron_npd.supervise.leftovers import return_stale_leases
from megatron_npd.supervise.restarts import delay_before_restart, related
from megatron_npd.supervise.role_work import Role
from megatron_npd.supervise.watching import HangWatch, storage_trouble

LOOK_SECONDS = 5.0
"""How often is looked whether a role that has left is needed again, and whether one hangs."""
SOON_SECONDS = 0.5
"""How often is looked whether a role that has not been started yet is wanted by now."""
MAX_RETURNS = 4
"""Work comes back rarely (a corrupt shard); a role that keeps leaving its work undone must not loop."""
LOG_LINES = 15


class Shift:
    """The crews of a run while the supervisor watches them."""

    def __init__(
        self,
        run: RunDirectory,
        roles: Sequence[Role],
        console: Console,
        journal: Journal,
        launch: LaunchConfig,
        guardian: Guardian,
        hurry: Callable[[], bool],
    ):
        self._run, self._console, self._journal = run, console, journal
        self._launch, self._guardian, self._hurry = launch, guardian, hurry
        self._crews = [Crew(role, guardian.environment) for role in roles]
        self._hangs = HangWatch(run, launch.hang_seconds)
        self._next_look = self._next_start = 0.0

    @property
    def running(self) -> list[Child]:
        """Every process that has not ended."""
        return [child for crew in self._crews for child in crew.running]

    def look(self) -> int | None:
        """See to every crew; returns the exit status of the run, or None to go on."""
        for crew in self._crews:
            status = None
            if failed := crew.failed():
                crew.end(self._hurry)
                status = self._after_failure(crew, failed[0])
            elif crew.due is not None and time.monotonic() >= crew.due:
                status = self._restart(crew)
            if status is not None:
                return status
        all_left = all(crew.has_left for crew in self._crews)
        if not all_left and time.monotonic() < self._next_look:
            return None if self._all_started or time.monotonic() < self._next_start else self._start_what_is_needed()
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._guardian.keep()
        with contextlib.suppress(OSError):
            return_stale_leases(self._run)
            self._kill_what_hangs()
        return self._start_what_is_needed()

    @property
    def _all_started(self) -> bool:
        """Whether no role is left that waits for its first start."""
        return all(crew.starts for crew in self._crews)

    def _start_what_is_needed(self) -> int | None:
        self._next_start = time.monotonic() + SOON_SECONDS
        all_left = all(crew.has_left for crew in self._crews)
        try:
            idle = [crew for crew in self._crews if crew.has_left and not crew.given_up]
            needed = [crew for crew in idle if not crew.role.is_done()]
            wanted = [crew for crew in needed if crew.starts or crew.role.is_wanted()]
        except OSError as error:
            if storage_reason(error) is None:
                raise
            self._console.say(f"cannot look into the run directory, looking again: {storage_reason(error)}")
            return None
        if all_left and not needed:
            return 0
        # With work left, somebody must be there: whatever the directory looks like, the run does not stand still.
        for crew in wanted or (needed if all_left else []):
            if crew.starts and crew.note_return() >= MAX_RETURNS:
                self._console.say(f"{crew.role.name} left its work undone {MAX_RETURNS} times, with status 0")
                return 1
            if (status := self._start(crew, " again: there is work for it" if crew.starts else "")) is not None:
                return status
        return None

    def _restart(self, crew: Crew) -> int | None:
        crew.due = None
        with contextlib.suppress(OSError):
            return_stale_leases(self._run)
            if crew.role.is_done():  # it failed when its work was finished
                self._console.say(f"{crew.role.name} is not started again: its work is done")
                return None
        self._journal.record(Event.RESTART, of=crew.role.name)
        return self._start(crew, " again")

    def _start(self, crew: Crew, words: str) -> int | None:
        self._console.say(f"starting {crew.role.name}{words}")
        try:
            crew.start()
        except OSError as error:
            if storage_reason(error) is None:
                raise
            crew.end(self._hurry)
            return self._after_failure(crew, error)
        return None

    def _after_failure(self, crew: Crew, cause: Child | OSError) -> int | None:
        """Say what happened and arrange the restart; returns the status to end with if there is none."""
        failure = crew.note_failure(cause)
        crew.children = []
        self._console.say(failure.how)
        if isinstance(cause, Child):
            self._say_last_lines(cause)
        if trouble := storage_trouble(self._run):
            self._console.say(f"nothing can be written to the run directory: {trouble}")
        lost = crew.role.is_lost()
        delay = None if crew.refuses or lost else delay_before_restart(crew.failures, self._launch)
        self._journal.record(Event.FAILURE, of=crew.role.name, how=failure.how, status=failure.status, restart_in=delay)
        if delay is None and self._can_do_without(crew):
            crew.given_up = True
            why = "its node is no longer part of this job" if lost else "it keeps failing"
            self._console.say(f"{crew.role.name} is given up, {why}; the run goes on without it")
            return None
        if lost:
            self._console.say(
                f"{crew.role.name} has lost its node, and the run cannot do without: it must go on elsewhere"
            )
            return NODE_LOST_STATUS
        if delay is None:
            self._explain_the_end(crew)
            return USAGE_STATUS if crew.refuses else 1
        crew.due = time.monotonic() + delay
        count, most = len(related(crew.failures, self._launch)), self._launch.max_restarts
        self._console.say(
            f"starting {crew.role.name} again in {delay:.0f} s, restart {count} of at most {most} without "
            "progress; the other roles go on"
        )
        return None

    def _can_do_without(self, crew: Crew) -> bool:
        """Whether others do the same work as a crew, or none is left. A refusal holds for all of them."""
        kind = crew.role.kind
        others = [other for other in self._crews if other is not crew and kind and other.role.kind == kind]
        if crew.refuses or not kind:
            return False
        return any(not other.given_up for other in others) or crew.role.is_done()

    def _say_last_lines(self, child: Child) -> None:
        said = tail(child.command.log, LOG_LINES, child.log_start)
        logs = [(child.command.log, child.log_start)]
        if child.command.is_srun and (log := first_failed_task(child.command.log, said)):
            logs.append((log, 0))
        for log, start in logs:
            self._console.say(f"the end of {log}:")
            for line in tail(log, LOG_LINES, start):
                self._console.say(f"    {line}")

    def _explain_the_end(self, crew: Crew) -> None:
        failures = related(crew.failures, self._launch)
        if len(failures) > 1:
            span = failures[-1].time - failures[0].time
            self._console.say(f"{crew.role.name} failed {len(failures)} times in {span:.0f} s and made no progress:")
            for failure in failures:
                self._console.say(f"    {failure.how}")
        again = "when the fault is mended and it is started again, the run continues from here"
        self._console.say(f"stopping the other roles; {again}")

    def _kill_what_hangs(self) -> None:
        hanging, steps = self._hangs.hanging(), self._hangs.hanging_steps()
        # A process that cannot write its sign of life looks as if it hangs.
        if not (hanging or steps) or storage_trouble(self._run):
            return
        for crew in self._crews:
            for child in crew.running:
                what = steps.get(child.command.name) if child.command.is_srun else hanging.get(child.pid)
                if what:
                    crew.kill(child, f"was killed: it hung for {self._launch.hang_seconds:.0f} s ({what})")
