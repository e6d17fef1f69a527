"""Taking units of work: skip what is done, lease what is not, come back for what another worker holds."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple

from megatron_npd.buffer.leases import is_free, lease
from megatron_npd.buffer.listing import is_finished, unfinished_units
from megatron_npd.buffer.plan import Stage
from megatron_npd.config import Config
from megatron_npd.process.waiting import Pace, explained
from megatron_npd.run_directory import RunDirectory


class WorkUnit(NamedTuple):
    """One unit of a stage, by its number."""

    stage: Stage
    number: int

    @property
    def is_given(self) -> bool:
        """Whether its responses are given, not generated."""
        return self.stage.is_given(self.number)

    def __str__(self) -> str:
        """As people count."""
        return f"{self.stage.name}, unit {self.number + 1} of {self.stage.units}"


class UnitsInHand:
    """Units of some stages that a worker holds: each is leased when it is taken, and until it is given back.

    A worker may hold as many as it keeps going at once. What dies with it are the leases: whoever is left takes its
    units over. Use it as a context manager, which gives back whatever is held.

    Args:
        kind: of the shards that the units become, `rollouts` or `samples`.
        stages: first come, first served.
        may_begin: asked before a unit of a stage is taken.
        wanted: units that this worker does not take at all are left out.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        kind: str,
        stages: list[Stage],
        may_begin: Callable[[Stage], bool] = lambda stage: True,
        wanted: Callable[[WorkUnit], bool] = lambda unit: True,
    ):
        self._run, self._kind, self._stages, self._may_begin = run, kind, stages, may_begin
        self._wanted = wanted
        self._lease_seconds, self._poll_seconds = config.launch.lease_seconds, config.launch.poll_seconds
        self._held: dict[tuple[str, int], contextlib.ExitStack] = {}
        self._found: deque[WorkUnit] = deque()  # undone at the last look, not tried since
        self._next_look = 0.0  # by time.monotonic: a worker that has other units to go on with asks at every step

    def take(self) -> WorkUnit | None:
        """The next undone unit, leased; None if there is none just now that may be begun and nobody else holds."""
        if not self._found and time.monotonic() >= self._next_look:
            self._found.extend(self._undone())
            self._next_look = time.monotonic() + self._poll_seconds
        while self._found and self._may_begin(self._found[0].stage):
            unit = self._found.popleft()
            if self._lease(unit):
                return unit
        self._found.clear()
        return None

    def give_back(self, unit: WorkUnit) -> None:
        """End the lease of a unit: its shard is there."""
        self._held.pop((unit.stage.name, unit.number)).close()

    def next_stage(self) -> Stage | None:
        """The first stage that has an undone unit, whoever holds it; None: all is done."""
        return next((stage for stage in self._stages if not is_finished(self._run, self._kind, stage)), None)

    def wait_for_others(self, stage: Stage) -> None:
        """Return when no unit of a stage is undone, or when one is that nobody holds any more."""
        pace = Pace(self._poll_seconds)
        with explained(f"other workers to finish the last {self._kind} of {stage.name}") as still:
            while undone := unfinished_units(self._run, self._kind, stage):
                if any(is_free(self._run.lease(self._kind, stage.name, unit), self._lease_seconds) for unit in undone):
                    break
                still()
                pace.sleep()
        self._next_look = 0.0

    def __enter__(self) -> UnitsInHand:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        while self._held:
            self._held.popitem()[1].close()

    def _undone(self) -> Iterator[WorkUnit]:
        for stage in self._stages:
            for number in unfinished_units(self._run, self._kind, stage):
                unit = WorkUnit(stage, number)
                if (stage.name, number) not in self._held and self._wanted(unit):
                    yield unit

    def _lease(self, unit: WorkUnit) -> bool:
        """Whether the unit is ours to do from now on."""
        place = (self._kind, unit.stage.name, unit.number)
        with contextlib.ExitStack() as stack:
            held = stack.enter_context(lease(self._run.lease(*place), self._lease_seconds))
            if held and not self._run.unit(*place).exists():
                self._held[unit.stage.name, unit.number] = stack.pop_all()
                return True
        return False


def take_units(run: RunDirectory, config: Config, kind: str, stage: Stage) -> Iterator[int]:
    """Yield each undone unit of a stage, leased while the caller works on it; end when all are done.

    Units leased to others are looked at again, so that the work of a worker that died is picked up by whoever is left.
    """
    with UnitsInHand(run, config, kind, [stage]) as hand:
        while True:
            if unit := hand.take():
                yield unit.number
                hand.give_back(unit)
            elif hand.next_stage():
                hand.wait_for_others(stage)
            else:
                return
