"""Metrics as JSON lines, one file a process, and TensorBoard scalars for what has a step.

A record always has `time` (Unix seconds at its end), `role` and `event`. A record with `seconds` also says that the
role was busy from `time - seconds` to `time`: the report draws roles over time from that.

Events: `step` (trainer: train/*, near_policy/*, perf/*, by global step), `unit` (rollout and annotator: samples,
response_tokens, tokens, seconds), `refresh` (rollout: version, parity_mean, parity_max), `publish` (trainer: version,
bytes), `evaluation` (annotator: version, heldout_kl), `phase` (supervisor and trainer: name).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


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


def _summary_writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
