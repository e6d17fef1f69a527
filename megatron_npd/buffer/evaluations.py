"""Which versions have answered which evaluations, and which still have to. A result is there whole, or not at all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_npd.buffer.leases import is_free, lease
from megatron_npd.buffer.plan import Plan
from megatron_npd.config import HELDOUT_KL, Config
from megatron_npd.files import read_json
from megatron_npd.roles import TEACHER
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import TEACHER_VERSION

KIND = "evaluation"
"""Of the leases."""


class Exam(NamedTuple):
    """One version's answers to one evaluation: what is leased, and done as a whole."""

    version: int
    evaluation: str
    """Its name."""

    def __str__(self) -> str:
        return f"{self.evaluation} by version {self.version}"


def exams_of(plan: Plan) -> list[Exam]:
    """All that a run has to answer, by version."""
    return sorted(Exam(version, name) for name, versions in plan.asked.items() for version in versions)


def is_answered(run: RunDirectory, exam: Exam) -> bool:
    """Whether its result is there."""
    return run.result(exam.evaluation, exam.version).is_file()


def open_exams(run: RunDirectory, plan: Plan) -> list[Exam]:
    """Those without a result, whoever works on them."""
    return [exam for exam in exams_of(plan) if not is_answered(run, exam)]


def answered_exams(run: RunDirectory, plan: Plan) -> int:
    """How many have one."""
    return sum(is_answered(run, exam) for exam in exams_of(plan))


def is_taken(run: RunDirectory, config: Config, exam: Exam) -> bool:
    """Whether a living worker holds it."""
    return not is_free(run.lease(KIND, exam.evaluation, exam.version), config.launch.lease_seconds)


def results_of(run: RunDirectory, evaluation: str) -> dict[int, dict[str, Any]]:
    """What was scored in an evaluation, by version; the teacher's, where it was asked, as TEACHER_VERSION."""
    found: dict[int, dict[str, Any]] = {}
    for path in run.results(evaluation).glob("*.json"):
        with contextlib.suppress(OSError, ValueError):  # copied by hand, or half
            found[TEACHER_VERSION if path.stem == TEACHER else int(path.stem.removeprefix("v"))] = read_json(path)
    return dict(sorted(found.items()))


def scores(run: RunDirectory, by: str, versions: Iterable[int]) -> dict[int, float]:
    """Those of these versions that have a score, and it: an evaluation's accuracy, or HELDOUT_KL; NaN: none can be
    told."""
    paths = {v: run.evaluation(v) if by == HELDOUT_KL else run.result(by, v) for v in versions}
    key = HELDOUT_KL if by == HELDOUT_KL else "accuracy"
    return {version: _number(path, key) for version, path in paths.items() if path.is_file()}


def best_of(scored: dict[int, float], by: str) -> int:
    """The version with the best score; of those with the same, and where none has a number, the later."""
    sign = -1 if by == HELDOUT_KL else 1
    marks = {version: -math.inf if math.isnan(score) else sign * score for version, score in scored.items()}
    return max(marks, key=lambda version: (marks[version], version))


def best_version(run: RunDirectory, plan: Plan, by: str) -> int | None:
    """The best of the versions that are to have a score; None as long as one of them has none."""
    versions = plan.evaluated if by == HELDOUT_KL else plan.asked[by]
    scored = scores(run, by, versions)
    return best_of(scored, by) if len(scored) == len(versions) else None


def _number(path: Path, key: str) -> float:
    try:
        value = read_json(path).get(key)
    except (OSError, ValueError, AttributeError):
        return math.nan
    return float(value) if isinstance(value, int | float) else math.nan


@contextlib.contextmanager
def taking(run: RunDirectory, config: Config, exam: Exam) -> Iterator[bool]:
    """Hold an exam for as long as the block lasts; yields whether it is ours and still to be done."""
    with lease(run.lease(KIND, exam.evaluation, exam.version), config.launch.lease_seconds) as held:
        yield held is not None and not is_answered(run, exam)
