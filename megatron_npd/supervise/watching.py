"""What the supervisor looks at besides its processes: whether they make progress, and whether files can be written."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

from megatron_npd.buffer.leases import filesystem_time
from megatron_npd.errors import storage_reason
from megatron_npd.files import probe_writing
from megatron_npd.process.activity import WAITING
from megatron_npd.process.heartbeat import QUIET_SECONDS, Sign, read_signs
from megatron_npd.run_directory import RunDirectory


def storage_trouble(run: RunDirectory) -> str | None:
    """Why nothing can be written to the run directory, or None if it can."""
    try:
        probe_writing(run.root)
    except OSError as error:
        return storage_reason(error) or str(error)
    return None


@dataclass
class _Seen:
    changes: int
    what: str
    since: float


class HangWatch:
    """Notices processes, of this machine and of Slurm steps, that neither make progress nor wait."""

    def __init__(self, run: RunDirectory, hang_seconds: float):
        """`hang_seconds`: 0: notices nothing."""
        self._run, self._hang_seconds = run, hang_seconds
        self._seen: dict[tuple[str, int], _Seen] = {}

    def hanging(self) -> dict[int, str]:
        """Process id -> what it has been doing for too long. Call now and then: what happens between two calls is
        not seen."""
        here = socket.gethostname()
        return {sign.pid: sign.what for sign in self._hanging() if sign.host == here}

    def hanging_steps(self) -> dict[str, str]:
        """The same by Slurm step: what one of its processes, on whatever host, has been doing for too long."""
        return {sign.step: sign.what for sign in self._hanging() if sign.step}

    def _hanging(self) -> list[Sign]:
        """Compares clocks with themselves alone. A hanging process still gives signs of life; a dead one does not."""
        if not self._hang_seconds:
            return []
        now, filesystem_now, hanging = time.monotonic(), filesystem_time(self._run.root), []
        living = [sign for sign in read_signs(self._run) if filesystem_now - sign.beat < QUIET_SECONDS]
        for sign in living:
            seen = self._seen.get((sign.host, sign.pid))
            if seen is None or seen.changes != sign.changes or sign.state == WAITING:
                self._seen[sign.host, sign.pid] = _Seen(sign.changes, sign.what, now)
            elif now - seen.since > self._hang_seconds:
                hanging.append(sign)
        still = {(sign.host, sign.pid) for sign in living}
        self._seen = {process: seen for process, seen in self._seen.items() if process in still}
        return hanging
