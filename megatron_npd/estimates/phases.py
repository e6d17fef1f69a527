"""A run as a list of phases, measured or simulated, in the same words: so that an estimate is held against a run phase
by phase.

A piece is one thing one worker did, from `begin` to `end`. Roles may work side by side, and at times none does, so

    sum of all pieces - side by side + idle = seconds of the whole run
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_npd.buffer.plan import Plan
from megatron_npd.estimates.rates import Rates
from megatron_npd.estimates.simulation import Span, Timeline, Workers
from megatron_npd.process.metrics import busy_span
from megatron_npd.roles import ANNOTATOR, ROLLOUT, ROLLOUT_TEACHER, SUPERVISOR, TRAINER
from megatron_npd.schema import Event

Record = dict[str, Any]

START, ROLLOUTS, ANNOTATION, EVALUATION, TRAINING, PUBLICATION, CHECKPOINT, REFRESH, FINISH = KINDS = (
    "start", "rollouts", "annotation", "evaluation", "training", "publication", "checkpoint", "refresh", "finish"
)  # fmt: skip
"""What a piece may be. A publication counts for as long as training stands still, a refresh as generation does."""

KIND_OF_RECORD = {
    (ROLLOUT_TEACHER, Event.UNIT): ROLLOUTS,
    (ROLLOUT, Event.UNIT): ROLLOUTS,
    (ROLLOUT, Event.REFRESH): REFRESH,
    (ANNOTATOR, Event.UNIT): ANNOTATION,
    (ANNOTATOR, Event.EVALUATION): EVALUATION,
    (TRAINER, Event.STEP): TRAINING,
    (TRAINER, Event.PUBLISH): PUBLICATION,
    (TRAINER, Event.CHECKPOINT): CHECKPOINT,
}
"""Role and event -> kind. The annotator's `refresh` is left out: it lies within its units and evaluations."""
KIND_OF_STAGE_WORK = {ROLLOUT: ROLLOUTS, ANNOTATOR: ANNOTATION, TRAINER: TRAINING}
KIND_OF_WORD = {"evaluate": EVALUATION, "publish": PUBLICATION, "checkpoint": CHECKPOINT, "refresh": REFRESH}
"""First word of a simulated span that is no stage -> kind."""


@dataclass(frozen=True)
class Piece:
    """`of`: the role that starts, the stage, or the policy version; "" where there is but one."""

    kind: str
    of: str
    begin: float
    end: float


@dataclass(frozen=True)
class Course:
    """A whole run. Seconds; the instants of the pieces share one clock."""

    pieces: list[Piece]
    seconds: float

    def busy(self) -> dict[tuple[str, str], float]:
        """Seconds of every (kind, of), over all workers, in the order of their first beginnings."""
        seconds: dict[tuple[str, str], float] = defaultdict(float)
        for piece in sorted(self.pieces, key=lambda piece: piece.begin):
            seconds[piece.kind, piece.of] += piece.end - piece.begin
        return dict(seconds)

    @property
    def side_by_side(self) -> float:
        """What the pieces take together beyond the time in which there is one at all."""
        return sum(piece.end - piece.begin for piece in self.pieces) - self._covered

    @property
    def idle(self) -> float:
        """Nobody is busy: everyone waits for its turn, for a file to appear, or for what is not recorded."""
        return self.seconds - self._covered

    @property
    def _covered(self) -> float:
        covered, until = 0.0, float("-inf")
        for piece in sorted(self.pieces, key=lambda piece: piece.begin):
            covered += max(piece.end - max(piece.begin, until), 0.0)
            until = max(until, piece.end)
        return covered


@dataclass(frozen=True)
class RoundsBalance:
    """What the rounds take, without the warm-up, seconds: on one machine the first two hold up the third."""

    annotation: float
    evaluation: float
    """Of the versions that the rounds published."""
    training: float

    @property
    def reading_per_training(self) -> float:
        """Annotation and evaluation over training; 0 of a run without rounds."""
        return (self.annotation + self.evaluation) / self.training if self.training else 0.0


def measured_course(records: Sequence[Record]) -> Course:
    """The course of a run that has begun, from its records (`process.metrics`), by time. What was done again after a
    restart counts as often as it was done; from the first process's creation to the last record."""
    pieces = [piece for record in records if (piece := _piece_of_record(record))]
    end = max(record["time"] for record in records)
    last_work = max((record["time"] for record in records if record.get("role") != SUPERVISOR), default=end)
    begin = min(piece.begin for piece in pieces)
    return Course([*pieces, Piece(FINISH, "", last_work, end)], end - begin)


def simulated_course(timeline: Timeline, rates: Rates, workers: Workers) -> Course:
    """The course that a simulation with these rates and workers says."""
    launch, end = rates.launch, timeline.seconds
    pieces = [Piece(START, SUPERVISOR, 0.0, launch.start_seconds)]
    pieces += [_piece_of_span(span, workers) for span in timeline.spans]
    pieces.append(Piece(FINISH, "", end - launch.finish_seconds, end))
    return Course(pieces, end)


def rounds_balance(course: Course, plan: Plan) -> RoundsBalance:
    """What the rounds of a plan take in a course."""
    busy = course.busy()
    stages = [stage.name for stage in plan.round_stages]
    versions = map(str, range(plan.first_round_version + 1, plan.final_version + 1))

    def total(kind: str, ofs: Iterable[str]) -> float:
        return sum(busy.get((kind, of), 0.0) for of in ofs)

    return RoundsBalance(total(ANNOTATION, stages), total(EVALUATION, versions), total(TRAINING, stages))


def _piece_of_record(record: Record) -> Piece | None:
    """None: the record is of no work, or of work that another record holds."""
    role, event, end = record.get("role"), record.get("event"), record["time"]
    if event == Event.START:
        # An engine may wait between its imports and its start, for a version to load: here they are put together.
        seconds = record.get("import_seconds", 0.0) + record.get("seconds", 0.0)
        return Piece(START, role, end - seconds, end)
    kind, span = KIND_OF_RECORD.get((role, event)), busy_span(record)
    if kind is None or span is None:
        return None
    return Piece(kind, str(record.get("stage", record.get("version", ""))), *span)


def _piece_of_span(span: Span, workers: Workers) -> Piece:
    word, _, of = span.what.partition(" ")
    if word == START:
        is_teachers = span.role == ROLLOUT and span.worker >= workers.sidecars
        return Piece(START, ROLLOUT_TEACHER if is_teachers else span.role, span.begin, span.end)
    if kind := KIND_OF_WORD.get(word):
        return Piece(kind, of, span.begin, span.end)
    return Piece(KIND_OF_STAGE_WORK[span.role], span.what, span.begin, span.end)
