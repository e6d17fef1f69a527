"""Taking units of work: skip what is done, lease what is not, come back for what another worker holds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from megatron_npd.buffer.leases import lease
from megatron_npd.buffer.listing import unfinished_units
from megatron_npd.buffer.plan import Stage
from megatron_npd.config import Config
from megatron_npd.process.waiting import explained
from megatron_npd.run_directory import RunDirectory


def take_units(run: RunDirectory, config: Config, kind: str, stage: Stage) -> Iterator[int]:
    """Yield each undone unit of a stage under a lease held while the caller works; end when all are done.

    Units leased to others are looked at again, so that the work of a worker that died is picked up by whoever is left.
    """
    with contextlib.ExitStack() as wait:
        still = None
        while undone := unfinished_units(run, kind, stage):
            worked = False
            for unit in undone:
                with lease(run.lease(kind, stage.name, unit), config.launch.lease_seconds) as held:
                    if held and not run.unit(kind, stage.name, unit).exists():
                        worked, still = True, wait.close()
                        yield unit
            if not worked:
                others = f"other workers to finish the last {kind} of {stage.name}"
                still = still or wait.enter_context(explained(others))
                still()
                time.sleep(config.launch.poll_seconds)
