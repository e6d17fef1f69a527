"""Problems from a data set of the user's: prompts as for training, and a column with the right answers."""

from __future__ import annotations

from itertools import islice
from typing import Any

from megatron_npd.config import Config, EvaluationConfig
from megatron_npd.data.prompt_rows import RowReader
from megatron_npd.data.rows import Row, open_rows, place_of
from megatron_npd.errors import UserError
from megatron_npd.tasks.evaluation_task import Problem

BATCH = 1000


def read_problems(
    config: Config, evaluation: EvaluationConfig, answer_column: str, count: int, needs_answer: bool = True
) -> list[Problem]:
    """The first `count` rows of `evaluation.path` as problems, or all (0); the reference is what the answer column has.

    Raises:
        UserError: no path; see `open_rows` and `RowReader`; a row without an answer, where one is needed; a name that
            comes twice; or no row at all.
    """
    path = evaluation.path
    if not path:
        raise UserError(
            f"evaluation.path of {evaluation.name}: missing; the task {evaluation.task} reads its problems from a file "
            "or data set"
        )
    rows = open_rows(path, trust_code=config.models.trust_remote_code)
    if needs_answer and rows.columns is not None and answer_column not in rows.columns:
        raise UserError(_no_answer(path, evaluation, answer_column, ", ".join(rows.columns)))
    framing = config.prompts.model_copy(update={"columns": evaluation.columns, "wrap": evaluation.wrap})
    reader = RowReader(path, rows.kind, rows.columns, framing, "evaluation", also_read=[answer_column])
    numbered = (pair for batch in rows.batches(BATCH) for pair in batch.rows())
    problems: dict[str, Problem] = {}
    for number, row in islice(numbered, count or None):
        prompt, place = reader.prompt(number, row), place_of(path, rows.kind, number)
        if needs_answer and answer_column not in row:
            raise UserError(_no_answer(place, evaluation, answer_column, ", ".join(row)))
        if prompt.name in problems:
            raise UserError(f"{place}: id {prompt.name!r} was already used; ids must be unique")
        problems[prompt.name] = Problem(prompt.name, prompt, _reference(row, answer_column))
    if not problems:
        raise UserError(f"{path}: no problems; must hold at least one")
    return list(problems.values())


def _reference(row: Row, column: str) -> Any:
    """What a row gives as the right answer: numbers as texts, as an answer is one."""
    value = row.get(column)
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _no_answer(place: str, evaluation: EvaluationConfig, column: str, there: str) -> str:
    return (
        f"{place}: must have a right answer in {column!r}, as evaluation.options.answer_column of {evaluation.name} "
        f"says; has {there or 'nothing'}"
    )
