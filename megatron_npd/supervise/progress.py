"""How far a run is, read from its directory alone: shards there are, the trainer's last step, ends of logs."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_npd.buffer.listing import finished_units
from megatron_npd.buffer.plan import Plan
from megatron_npd.process.activity import WAITING, WORKING
from megatron_npd.process.heartbeat import read_signs
from megatron_npd.process.logs import tail
from megatron_npd.roles import TRAINER
from megatron_npd.run_directory import HELDOUT_STAGE, RunDirectory
from megatron_npd.schema import Event, StepMetric
from megatron_npd.supervise.children import Child
from megatron_npd.supervise.console import PART
from megatron_npd.supervise.journal import Journal

FINISHING = "finishing"
"""Phase after the last unit is annotated: the rest of the training, publishing, evaluation."""


class Progress:
    """Looks at a run directory; records in the supervisor's journal how long each phase took."""

    def __init__(self, run: RunDirectory, plan: Plan, journal: Journal):
        self._run, self._journal = run, journal
        self._unfinished = list(plan.stages.values())
        self._phase, self._since = "", time.monotonic()

    def describe(self, running: Sequence[Child]) -> str:
        """One line, its parts by importance: the stage being worked on, its units, the trainer's step and loss, what
        each role is doing, who waits behind who works."""
        parts = [self._stage_text()]
        if step := self._last_step():
            loss = step.get(StepMetric.LOSS)
            parts.append(f"step {step.get('step')}" + (f" loss {loss:.4f}" if isinstance(loss, float) else ""))
        return PART.join(parts + self._activities(running))

    def finish(self) -> None:
        """Record the last phase."""
        self._enter("")

    def _activities(self, running: Sequence[Child]) -> list[str]:
        """What the first rank of each role says that it is doing; of a wait also since when."""
        pids, steps = ({child.pid for child in running}, {child.command.name for child in running})
        told: dict[str, list[str]] = {WORKING: [], WAITING: []}
        here = socket.gethostname()
        for sign in read_signs(self._run):
            is_ours = sign.step in steps if sign.step else sign.pid in pids and sign.host == here
            if is_ours and not sign.rank:
                since = time.strftime(" since %H:%M:%S", time.localtime(sign.since)) if sign.state == WAITING else ""
                waiting = "waiting for " if sign.state == WAITING else ""
                told[WAITING if waiting else WORKING].append(f"{sign.role}: {waiting}{sign.what}{since}")
        return told[WORKING] + told[WAITING]

    def _stage_text(self) -> str:
        """The first unfinished stage; those once complete are not looked at again."""
        while self._unfinished:
            stage = self._unfinished[0]
            done = {kind: len(finished_units(self._run, kind, stage)) for kind in ("rollouts", "samples")}
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
                self._journal.record(Event.PHASE, name=self._phase, seconds=now - self._since)
            self._phase, self._since = phase, now

    def _last_step(self) -> dict[str, Any] | None:
        return last_record(self._run.metrics(TRAINER), Event.STEP)


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
