"""Answers that must be the right one to the letter: of a file, with a regular expression that finds them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import field_validator

from megatron_npd.config import Config, EvaluationConfig, Section, validated
from megatron_npd.errors import UserError
from megatron_npd.tasks.evaluation_task import Answer, Grade, Problem, where_options
from megatron_npd.tasks.problem_rows import read_problems


class ExactMatchOptions(Section):
    """`evaluation.options` of the task `exact_match`."""

    answer_column: str = "answer"
    """The field with the right answer, or with a list of right ones."""
    extract: str = ""
    """Regular expression whose last match in a response is its answer: group 1 where it has groups, else the whole.
    Empty: the whole response."""
    extract_reference: str = ""
    """The same for what the answer column holds, e.g. `#### (.*)`."""
    ignore_case: bool = False

    @field_validator("extract", "extract_reference")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern


class ExactMatch:
    """Compares texts, spaces at the ends and how many between words aside."""

    def __init__(self, config: Config, evaluation: EvaluationConfig):
        self._config, self._evaluation = config, evaluation
        self._options = validated(ExactMatchOptions, evaluation.options, where_options(evaluation))

    def problems(self, count: int) -> list[Problem]:
        problems = read_problems(self._config, self._evaluation, self._options.answer_column, count)
        for problem in problems:
            if not self._right_ones(problem):
                raise UserError(
                    f"{self._evaluation.path}: problem {problem.name!r}: no right answer in {problem.reference!r}; "
                    "must be a text, or a list of texts, in which extract_reference finds one"
                )
        return problems

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        return [self._grade(answer) for answer in answers]

    def _grade(self, answer: Answer) -> Grade:
        extracted = last_match(self._options.extract, answer.response)
        right = extracted is not None and self._plain(extracted) in self._right_ones(answer.problem)
        return Grade(right, extracted)

    def _right_ones(self, problem: Problem) -> list[str]:
        references = problem.reference if isinstance(problem.reference, list) else [problem.reference]
        found = (last_match(self._options.extract_reference, str(text)) for text in references if text is not None)
        return [self._plain(text) for text in found if text is not None]

    def _plain(self, text: str) -> str:
        plain = " ".join(text.split())
        return plain.casefold() if self._options.ignore_case else plain


def last_match(pattern: str, text: str) -> str | None:
    """What a regular expression finds last in a text; the text itself for an empty one, None where it finds nothing."""
    if not pattern:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    return (matches[-1].group(1) or "") if matches[-1].re.groups else matches[-1].group()
