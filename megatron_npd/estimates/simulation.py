"""The roles of a run as queues: who works when, and who waits. A deterministic discrete-event simulation (SimPy).

Sidecars take a stage's units as soon as its policy version is visible; annotators take units as soon as they are rolled
out, and evaluate versions when there are none; the trainer trains on a stage as soon as all of it is annotated, and
publishes. With `turns` only one of them computes at a time, as the roles of one small machine do (`launch.turns`), and
each starts when there is something for it to do.

Left out: that given responses are written before an engine starts, leases that expire, restarts, a buffer that is full,
refreshes the near-policy limit asks for, and that units of one stage differ in length.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import simpy

from megatron_npd.estimates.rates import Rates
from megatron_npd.estimates.workload import StageWork, Workload
from megatron_npd.roles import ANNOTATOR, ROLLOUT, TRAINER
from megatron_npd.run_directory import HELDOUT_STAGE, WARMUP_STAGE

Process = Generator[simpy.Event, Any, Any]


@dataclass(frozen=True)
class Workers:
    """How many of each there are."""

    replicas: int = 1
    """Data-parallel replicas of the trainer."""
    annotators: int = 1
    sidecars: int = 1
    teacher_sidecars: int = 0
    """Sidecars for the teacher's responses alone, which end with them; 0: all sample the teacher's first, then the
    student's, as under Slurm."""
    turns: bool = False


@dataclass(frozen=True)
class Span:
    """A worker was busy."""

    role: str
    worker: int
    what: str
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What the simulation says; seconds from the command."""

    seconds: float
    spans: list[Span]
    workers: dict[str, int]
    """Of each role."""

    def busy(self, role: str) -> float:
        """Seconds a worker of the role was busy on average; its start counts."""
        return sum(span.end - span.begin for span in self.spans if span.role == role) / self.workers[role]

    def idle_share(self, role: str) -> float:
        """Share of the run that a worker of the role spent waiting, on average."""
        return 1.0 - self.busy(role) / self.seconds


def simulate(work: Workload, rates: Rates, workers: Workers) -> Timeline:
    """Run it through."""
    run = _Run(work, rates, workers)
    done = simpy.AllOf(run.env, [run.env.process(process) for process in run.processes()])
    run.env.run(done)
    counts = {TRAINER: 1, ANNOTATOR: workers.annotators, ROLLOUT: workers.sidecars + workers.teacher_sidecars}
    return Timeline(run.env.now + rates.launch.finish_seconds, run.spans, counts)


@dataclass
class _Progress:
    """One stage under way."""

    work: StageWork
    to_roll_out: list[int]
    to_annotate: int
    annotated: simpy.Event


@dataclass
class _Run:
    work: Workload
    rates: Rates
    workers: Workers
    env: simpy.Environment = field(default_factory=simpy.Environment)
    spans: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.turn = simpy.Resource(self.env) if self.workers.turns else None
        self.published = [self.env.event() for _ in range(self.work.final_version + 1)]
        self.stages = [
            _Progress(stage, list(stage.units), len(stage.units), self.env.event()) for stage in self.work.stages
        ]
        self.heldout, self.first_unit, self.first_samples = (self.env.event() for _ in range(3))
        """The held-out responses are there; the first unit to annotate is; the first one is annotated."""
        self.ready: list[tuple[_Progress, int]] = []
        """Units to annotate: stage, responses."""
        self.versions: list[int] = []
        """Published and not evaluated."""
        self.evaluated = 0
        self.news = self.env.event()
        """Happens, and is replaced, when annotators may find something new to do."""

    def processes(self) -> Iterator[Process]:
        """One a worker."""
        teachers = [stage for stage in self.stages if stage.work.is_teachers]
        students = [stage for stage in self.stages if not stage.work.is_teachers]
        yield self._trainer()
        yield from (self._annotator(worker) for worker in range(self.workers.annotators))
        for worker in range(self.workers.sidecars):
            yield self._sidecar(worker, students, [] if self.workers.teacher_sidecars else teachers)
        for worker in range(self.workers.teacher_sidecars):
            yield self._teacher_sidecar(self.workers.sidecars + worker, teachers)

    def _trainer(self) -> Process:
        rates, busy = self.rates.trainer, self._busy
        if self.turn and any(stage.work.name == WARMUP_STAGE for stage in self.stages):
            yield self.first_samples
        yield from self._start(TRAINER, 0, rates.start_seconds)
        yield from self._publish(0)
        for stage in self.stages:
            if not stage.work.packs_of_steps:
                continue
            yield stage.annotated
            for number, packs in enumerate(stage.work.packs_of_steps, start=1):
                positions = math.ceil(packs / self.workers.replicas) * self.work.tokens_per_pack
                seconds = positions / rates.tokens_per_second + rates.step_seconds
                yield from busy(TRAINER, 0, stage.work.name, seconds)
                if number == stage.work.publish_after:
                    yield from self._publish(stage.work.publishes)
            yield from busy(TRAINER, 0, "checkpoint", rates.checkpoint_seconds)

    def _publish(self, version: int) -> Process:
        rates = self.rates.trainer
        yield from self._busy(TRAINER, 0, f"publish {version}", rates.publish_stall_seconds)
        self.env.process(self._appear(version, max(rates.publish_seconds - rates.publish_stall_seconds, 0.0)))

    def _appear(self, version: int, seconds: float) -> Process:
        yield self.env.timeout(seconds)
        self.published[version].succeed()
        if version in self.work.evaluated:
            self.versions.append(version)
            self._tell()

    def _sidecar(self, worker: int, students: list[_Progress], teachers: list[_Progress]) -> Process:
        if teachers:
            yield from self._teacher_sidecar(worker, teachers)
        served = None
        for stage in students:
            if not stage.to_roll_out:
                continue
            if served is None:
                # Local sidecars load the first version there is while the teacher's responses are being sampled, unless
                # they would take the cores for that from others.
                served = stage.work.version if teachers or self.turn else 0
                yield self.published[served]
                yield from self._start(ROLLOUT, worker, self.rates.rollout.start_seconds, launch=not teachers)
            if served != stage.work.version:
                yield self.published[stage.work.version]
                served = stage.work.version
                yield from self._busy(ROLLOUT, worker, f"refresh {served}", self.rates.rollout.refresh_seconds)
            yield from self._roll_out(worker, stage, self.rates.rollout.tokens_per_second)

    def _teacher_sidecar(self, worker: int, teachers: list[_Progress]) -> Process:
        yield from self._start(ROLLOUT, worker, self.rates.rollout_teacher.start_seconds)
        for stage in teachers:
            yield from self._roll_out(worker, stage, self.rates.rollout_teacher.tokens_per_second)

    def _roll_out(self, worker: int, stage: _Progress, tokens_per_second: float) -> Process:
        while stage.to_roll_out:
            is_given = len(stage.to_roll_out) <= stage.work.given_units
            responses = stage.to_roll_out.pop(0)
            seconds = 0.0 if is_given else responses * self.work.response_tokens / tokens_per_second
            yield from self._busy(ROLLOUT, worker, stage.work.name, seconds)
            if stage.work.name != HELDOUT_STAGE:
                self.ready.append((stage, responses))
                _happen(self.first_unit)
            else:
                stage.to_annotate -= 1
                if not stage.to_annotate:
                    self.heldout.succeed()
            self._tell()

    def _annotator(self, worker: int) -> Process:
        rates = self.rates.annotator
        loaded: int | None = None
        has_read_heldout = False
        if self.turn:
            yield self.first_unit
        yield from self._start(ANNOTATOR, worker, rates.start_seconds)
        while self.evaluated < len(self.work.evaluated):
            if self.ready:
                stage, responses = self.ready.pop(0)
                seconds = responses * stage.work.prefilled_tokens / rates.tokens_per_second
                wanted = loaded if stage.work.is_teachers else stage.work.version
                what = stage.work.name
            elif self.versions and self.heldout.triggered:
                stage, wanted = None, self.versions.pop(0)
                passes = 1 if has_read_heldout else 2
                has_read_heldout = True
                seconds = passes * self.work.heldout_tokens / rates.tokens_per_second
                what = f"evaluate {wanted}"
            else:
                yield self.news
                continue
            if wanted != loaded:
                loaded, seconds = wanted, seconds + rates.load_seconds
            yield from self._busy(ANNOTATOR, worker, what, seconds)
            if stage is None:
                self.evaluated += 1
                self._tell()  # the last evaluation ends the others
            else:
                _happen(self.first_samples)
                stage.to_annotate -= 1
                if not stage.to_annotate:
                    stage.annotated.succeed()

    def _start(self, role: str, worker: int, seconds: float, launch: bool = True) -> Process:
        """Import and load: roles do that side by side, turns or not."""
        if launch:
            yield self.env.timeout(max(self.rates.launch.start_seconds - self.env.now, 0.0))
        begin = self.env.now
        yield self.env.timeout(seconds)
        self.spans.append(Span(role, worker, "start", begin, self.env.now))

    def _busy(self, role: str, worker: int, what: str, seconds: float) -> Process:
        with self.turn.request() if self.turn else contextlib.nullcontext() as request:
            if request:
                yield request
            begin = self.env.now
            yield self.env.timeout(seconds)
            self.spans.append(Span(role, worker, what, begin, self.env.now))

    def _tell(self) -> None:
        self.news.succeed()
        self.news = self.env.event()


def _happen(event: simpy.Event) -> None:
    """Let an event happen that may have happened already."""
    if not event.triggered:
        event.succeed()
