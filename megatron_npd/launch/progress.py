"""How far a run is, read from its directory alone: shards there are, the trainer's last step, ends of logs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_npd.buffer.plan import Plan, Stage
from megatron_npd.launch.logs import last_message, tail
from megatron_npd.launch.processes import Child
from megatron_npd.launch.roles import TRAINER
from megatron_npd.observe.metrics import Metrics
from megatron_npd.run_directory import HELDOUT_STAGE, RunDirectory

FINISHING = "finishing"
"""Phase after the last unit is annotated: the rest of the training, publishing, evaluation."""
_MESSAGE_WIDTH = 60


class Progress:
    """Looks at a run directory; records in the supervisor's metrics how long each phase took."""

    def __init__(self, run: RunDirectory, plan: Plan):
        self._run = run
        self._unfinished = list(plan.stages.values())
        self._phase, self._since = "", time.monotonic()
        self._metrics = Metrics(run.metrics("supervisor"), "supervisor")

    def describe(self, running: Sequence[Child]) -> str:
        """One line: the stage being worked on, its units, the trainer's step and loss, what each role said last."""
        parts = [self._stage_text()]
        if step := self._last_step():
            loss = step.get("train/loss")
            parts.append(f"step {step.get('step')}" + (f" loss {loss:.4f}" if isinstance(loss, float) else ""))
        for child in running:
            message = last_message(child.command.log, child.log_start)
            if message and ".rank" not in child.command.name:
                parts.append(f"{child.command.name}: {message[:_MESSAGE_WIDTH]}")
        return " | ".join(parts)

    def finish(self) -> None:
        """Record the last phase."""
        self._enter("")

    def _stage_text(self) -> str:
        """The first unfinished stage; those once complete are not looked at again."""
        while self._unfinished:
            stage = self._unfinished[0]
            done = {kind: self._count(kind, stage) for kind in ("rollouts", "samples")}
            # The held-out set is evaluated, not annotated.
            if done["rollouts" if stage.name == HELDOUT_STAGE else "samples"] < stage.units:
                self._enter(stage.name)
                annotated = "" if stage.name == HELDOUT_STAGE else f", {done['samples']} annotated"
                return f"{stage.name}: {done['rollouts']}/{stage.units} units rolled out{annotated}"
            self._unfinished.pop(0)
        self._enter(FINISHING)
        return "every response annotated"

    def _enter(self, phase: str) -> None:
        if phase != self._phase:
            now = time.monotonic()
            if self._phase:
                self._metrics.log("phase", name=self._phase, seconds=now - self._since)
            self._phase, self._since = phase, now

    def _count(self, kind: str, stage: Stage) -> int:
        folder = self._run.unit(kind, stage.name, 0).parent
        return sum(name.endswith(".safetensors") for name in os.listdir(folder)) if folder.is_dir() else 0

    def _last_step(self) -> dict[str, Any] | None:
        return last_record(self._run.metrics(TRAINER), "step")


def last_record(path: Path, event: str) -> dict[str, Any] | None:
    """The newest record of an event near the end of a metrics file; a torn last line is passed over."""
    for line in reversed(tail(path, 50)):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and record.get("event") == event:
            return record
    return None
