"""Answers graded by a command of the user's: JSON lines in, one verdict a line out.

The command gets one line for each answer, `{"name", "prompt", "response", "reference"}`, and writes one for each, in
the same order: true or 1 (right), false or 0 (wrong), or `{"correct": ..., "extracted": ...}`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from megatron_npd.config import Config, EvaluationConfig, Section, validated
from megatron_npd.errors import GraderError, UserError
from megatron_npd.tasks.evaluation_task import Answer, Grade, Problem, where_options
from megatron_npd.tasks.problem_rows import read_problems


class UserCommandOptions(Section):
    """`evaluation.options` of the task `command`."""

    command: list[str] = Field(min_length=1)
    """The program and its arguments; started where the run is, without a shell."""
    timeout_seconds: float = Field(600.0, gt=0.0)
    """How long it may take for all answers of one version."""
    answer_column: str = "answer"
    """The field that becomes `reference`; a row may be without it."""


class UserCommand:
    """Reads its problems from a file, and has the command grade."""

    def __init__(self, config: Config, evaluation: EvaluationConfig):
        self._config, self._evaluation = config, evaluation
        self._options = validated(UserCommandOptions, evaluation.options, where_options(evaluation))

    def problems(self, count: int) -> list[Problem]:
        column = self._options.answer_column
        return read_problems(self._config, self._evaluation, column, count, needs_answer=False)

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        lines = [
            {"name": problem.name, "prompt": problem.question, "response": response, "reference": problem.reference}
            for problem, response in answers
        ]
        output = self._run("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        verdicts = output.splitlines()
        if len(verdicts) != len(answers):
            raise GraderError(
                f"{self}: wrote {len(verdicts)} lines for {len(answers)} answers; must write one for each"
            )
        return [self._read(verdict) for verdict in verdicts]

    def __str__(self) -> str:
        return f"evaluation.options.command of {self._evaluation.name} = {self._options.command}"

    def _run(self, text: str) -> str:
        options = self._options
        try:
            done = subprocess.run(
                options.command, input=text.encode(), capture_output=True, timeout=options.timeout_seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise GraderError(f"{self}: not done after options.timeout_seconds = {options.timeout_seconds:g}") from None
        except OSError as error:
            raise UserError(f"{self}: cannot be started: {error.strerror}") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise GraderError(f"{self}: exit status {done.returncode}: {said[-1] if said else 'nothing on stderr'}")
        return done.stdout.decode(errors="replace")

    def _read(self, line: str) -> Grade:
        try:
            value: Any = json.loads(line)
        except ValueError:
            value = None
        extracted = None
        if isinstance(value, dict):
            extracted, value = value.get("extracted"), value.get("correct")
        if value not in (0, 1):  # true and false are 1 and 0
            raise GraderError(
                f'{self}: wrote {line!r}; each line must be 0, 1, true, false or {{"correct": true, "extracted": ""}}'
            )
        return Grade(bool(value), None if extracted is None else str(extracted))
