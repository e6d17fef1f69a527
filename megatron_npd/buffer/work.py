"""Taking units of work: skip what is done, lease what is not, come back for what another worker holds."""

from __future__ import annotations

import time
from collections.abc import Iterator

from megatron_npd.buffer.leases import is_free, lease
from megatron_npd.buffer.listing import unfinished_units
from megatron_npd.buffer.plan import Stage
from megatron_npd.config import Config
from megatron_npd.process.waiting import explained
from megatron_npd.run_directory import RunDirectory


def take_units(run: RunDirectory, config: Config, kind: str, stage: Stage) -> Iterator[int]:
    """Yield each undone unit of a stage under a lease held while the caller works; end when all are done.

    Units leased to others are looked at again, so that the work of a worker that died is picked up by whoever is left.
    """
    while undone := unfinished_units(run, kind, stage):
        worked = False
        for unit in undone:
            with lease(run.lease(kind, stage.name, unit), config.launch.lease_seconds) as held:
                if held and not run.unit(kind, stage.name, unit).exists():
                    worked = True
                    yield unit
        if not worked:
            _wait_for_others(run, config, kind, stage)


def _wait_for_others(run: RunDirectory, config: Config, kind: str, stage: Stage) -> None:
    """Return when no unit of the stage is left, or one that nobody holds any more."""
    with explained(f"other workers to finish the last {kind} of {stage.name}") as still:
        while undone := unfinished_units(run, kind, stage):
            if any(is_free(run.lease(kind, stage.name, unit), config.launch.lease_seconds) for unit in undone):
                return
            still()
            time.sleep(config.launch.poll_seconds)
