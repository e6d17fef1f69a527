"""Metrics as JSON lines, one file a process, and TensorBoard scalars for what has a step.

A record always has `time` (Unix seconds at its end), `role` and `event`. A record with `seconds` also says that the
role was busy from `time - seconds` to `time`: the report draws roles over time from that (`busy_span`).

Events: `step` (trainer: train/*, near_policy/*, perf/*, by global step), `unit` (rollout and annotator: samples,
response_tokens, tokens, seconds), `refresh` (rollout: version, bytes, verify_seconds before the engine was stopped,
stall_seconds for which it was, parity_mean, parity_max), `publish` (trainer: version,
bytes, seconds from the beginning until it was visible, stall_seconds of them during which training stood still: the
rest ran beside training), `evaluation` (annotator: version, heldout_kl), `answers` (rollout: evaluation, version,
accuracy, problems, response_tokens), `phase` (supervisor and trainer: name),
`start` (every process: import_seconds from its creation until its own work began, then `seconds` of loading),
`memory` (peak_bytes of a process's memory so far, of the largest rank; device_peak_bytes of a GPU's).
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import StepMetric

INSTANCE = "NPD_INSTANCE"
"""Environment variable: tells this process from others of its role, where there are several."""


class Metrics:
    """Appends records to one file; a killed process leaves whole lines and at most a torn last one."""

    def __init__(self, path: Path, role: str, tensorboard: Path | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._role = role
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
        if torn:  # a killed process left half a line: it must not swallow the first new one
            self._file.write("\n")
        self._scalars = _summary_writer(tensorboard) if tensorboard else None

    def log(self, event: str, step: int | None = None, **values: Any) -> None:
        """Append one record; numbers with a `group/name` also go to TensorBoard when `step` is given."""
        record: dict[str, Any] = {"time": time.time(), "role": self._role, "event": event}
        if step is not None:
            record["step"] = step
        self._file.write(json.dumps(record | values) + "\n")
        self._file.flush()
        if self._scalars and step is not None:
            for name, value in values.items():
                if "/" in name and isinstance(value, int | float):
                    self._scalars.add_scalar(name, value, step)
            self._scalars.flush()


def metrics_file(run: RunDirectory, role: str) -> Path:
    """This process's metrics file."""
    instance = os.environ.get(INSTANCE)
    return run.metrics(f"{role}.{instance}" if instance else role)


def process_seconds() -> float:
    """How long ago this process was created. Called as a role begins: what it took to start Python and import."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def busy_span(record: dict[str, Any]) -> tuple[float, float] | None:
    """When (Unix seconds, from and to) a record's role did nothing else; None if the record does not say."""
    seconds = _finite(record, "seconds") or _finite(record, StepMetric.SECONDS)
    if not seconds:
        return None
    stall = _finite(record, "stall_seconds")
    begin = record["time"] - seconds
    return begin, begin + (seconds if stall is None else min(stall, seconds))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every record of every role below a `metrics/` folder, by time; a torn last line is passed over."""
    records = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and "time" in record:
                records.append(record)
    return sorted(records, key=lambda record: record["time"])


def _finite(record: dict[str, Any], key: str) -> float | None:
    value = record.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _summary_writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
