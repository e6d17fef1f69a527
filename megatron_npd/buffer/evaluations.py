"""Which versions have answered which evaluations, and which still have to. A result is there whole, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from megatron_npd.buffer.leases import is_free, lease
from megatron_npd.buffer.plan import Plan
from megatron_npd.config import Config
from megatron_npd.run_directory import RunDirectory

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


@contextlib.contextmanager
def taking(run: RunDirectory, config: Config, exam: Exam) -> Iterator[bool]:
    """Hold an exam for as long as the block lasts; yields whether it is ours and still to be done."""
    with lease(run.lease(KIND, exam.evaluation, exam.version), config.launch.lease_seconds) as held:
        yield held is not None and not is_answered(run, exam)
