"""The tasks there are, by the name that `evaluation.task` calls them by."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from megatron_npd.config import Config, EvaluationConfig
from megatron_npd.errors import UserError
from megatron_npd.tasks.evaluation_task import EvaluationTask
from megatron_npd.tasks.exact_match import ExactMatch
from megatron_npd.tasks.mathematics import Mathematics
from megatron_npd.tasks.reasoning_gym_task import ReasoningGym
from megatron_npd.tasks.user_command import UserCommand

TASKS: dict[str, Callable[[Config, EvaluationConfig], EvaluationTask]] = {
    "command": UserCommand,
    "exact_match": ExactMatch,
    "mathematics": Mathematics,
    "reasoning_gym": ReasoningGym,
}


def make_task(config: Config, evaluation: EvaluationConfig) -> EvaluationTask:
    """The task of an evaluation.

    Raises:
        UserError: there is no such task, one of its keys is wrong, or a library it needs is missing.
    """
    if evaluation.task not in TASKS:
        near = difflib.get_close_matches(evaluation.task, TASKS, n=1, cutoff=0.0)
        raise UserError(
            f"evaluation.task = {evaluation.task!r}: must be one of {', '.join(TASKS)}; did you mean {near[0]}?"
        )
    return TASKS[evaluation.task](config, evaluation)
