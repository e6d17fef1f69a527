"""What happened to the run itself, for `npd status` and the report: metrics/supervisor.jsonl.

Events: `start` (import_seconds: of this process until it starts the roles), `phase` (name, seconds), `failure` (of: the
role; how, status), `restart` (of), `stop` (signal).
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from megatron_npd.process.metrics import Metrics
from megatron_npd.roles import SUPERVISOR
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import Event


class Journal:
    """Appends records. A disk that takes none loses records, never the run."""

    def __init__(self, run: RunDirectory):
        self._path = run.metrics(SUPERVISOR)
        self._metrics: Metrics | None = None

    def record(self, event: Event, **values: Any) -> None:
        """Append one record, if it can be."""
        with contextlib.suppress(OSError):
            self._metrics = self._metrics or Metrics(self._path, SUPERVISOR)
            self._metrics.log(event, **values)


def read_journal(run: RunDirectory) -> list[dict[str, Any]]:
    """Every record, in order; a torn last line is passed over."""
    try:
        lines = run.metrics(SUPERVISOR).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "event" in record:
                records.append(record)
    return records
