"""Mathematics from a file, graded by math-verify: 1/2, 0.5 and \\frac{1}{2} are one answer.

In a response the last \\boxed{...} counts, else the last formula or number. So it pays to ask for a box in `wrap`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from megatron_npd.config import Config, EvaluationConfig, Section, validated
from megatron_npd.errors import UserError
from megatron_npd.tasks.evaluation_task import Answer, Grade, Problem, require, where_options
from megatron_npd.tasks.exact_match import last_match
from megatron_npd.tasks.problem_rows import read_problems

logger = logging.getLogger(__name__)

MARKS_OF_LATEX = ("$", "\\boxed", "\\(", "\\[", "\\begin")
"""What math-verify finds a formula by; a bare \\frac{1}{2} would be read as its last number."""


class MathematicsOptions(Section):
    """`evaluation.options` of the task `mathematics`."""

    answer_column: str = "answer"
    """The field with the right answer: a number, an expression, LaTeX."""
    extract_reference: str = ""
    """Regular expression whose last match in that field is the answer, e.g. `#### (.*)`; as in `exact_match`."""


class Mathematics:
    """Compares what two texts mean. math-verify stops a comparison after seconds by an alarm, which only the main
    thread of a process can set: it grades there."""

    def __init__(self, config: Config, evaluation: EvaluationConfig):
        self._config, self._evaluation = config, evaluation
        self._options = validated(MathematicsOptions, evaluation.options, where_options(evaluation))
        self._library: Any = require("math_verify", evaluation)
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # a response that it cannot read is no news

    def problems(self, count: int) -> list[Problem]:
        problems = read_problems(self._config, self._evaluation, self._options.answer_column, count)
        for problem in problems:
            if not self._gold(problem):
                raise UserError(
                    f"{self._evaluation.path}: problem {problem.name!r}: the answer {problem.reference!r} is nothing "
                    "that math-verify can read; must be a number, an expression or LaTeX"
                )
        return problems

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        return [self._grade(answer) for answer in answers]

    def _grade(self, answer: Answer) -> Grade:
        said = self._library.parse(answer.response)
        # math-verify gives what it understood, and behind it the text that it understood.
        return Grade(bool(self._library.verify(self._gold(answer.problem), said)), str(said[-1]) if said else None)

    def _gold(self, problem: Problem) -> list[Any]:
        text = last_match(self._options.extract_reference, str(problem.reference))
        if not text:
            return []
        if any(mark in text for mark in MARKS_OF_LATEX):
            return self._library.parse(text)
        return self._library.parse(f"${text}$") or self._library.parse(text)
