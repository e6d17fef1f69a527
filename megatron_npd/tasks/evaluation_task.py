"""The seam of evaluation: what a task is, and what its problems, answers and grades are."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from megatron_npd.config import EvaluationConfig
from megatron_npd.data.prompt_rows import Prompt
from megatron_npd.errors import UserError

PROBLEMS = 500
"""Of a task that makes its own, where `evaluation.problems` does not say."""


@dataclass(frozen=True)
class Problem:
    """One problem of a task."""

    name: str
    """Unique in its task."""
    prompt: str | Prompt
    """What the user says, which is framed as training prompts are; or a whole prompt, as a data set has it."""
    reference: Any
    """What the grader goes by, a JSON value: the right answer, or whatever it needs."""

    @property
    def question(self) -> str:
        """What is asked, for graders and people."""
        if isinstance(self.prompt, str):
            return self.prompt
        messages = self.prompt.messages
        return str(messages[0]["content"]) if len(messages) == 1 else self.prompt.words


class Answer(NamedTuple):
    """What a model said to a problem, without the token that ended it."""

    problem: Problem
    response: str


class Grade(NamedTuple):
    """What became of an answer."""

    correct: bool
    extracted: str | None = None
    """What was taken for the answer proper; None: there was none in the response, or it is not told apart."""


class EvaluationTask(Protocol):
    """Made by a process that prepares a run, and again by every one that grades; so both must be functions of the
    configuration and of their arguments.

    What makes one is called with the whole `Config` and with its `EvaluationConfig`, and raises `UserError` where a key
    is wrong or a library is missing.
    """

    def problems(self, count: int) -> list[Problem]:
        """The first `count` problems, or all of them; 0: all there are.

        Raises:
            UserError: the data has none, or one that breaks a rule.
        """

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        """Grades of answers, in their order. The problems' prompts are their questions here, whatever they were.

        Raises:
            GraderError: they cannot be graded.
        """


def require(library: str, evaluation: EvaluationConfig, extra: str = "evaluate") -> ModuleType:
    """A library that only some tasks need.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise UserError(
            f"evaluation.task = {evaluation.task!r}: needs the Python package {library.replace('_', '-')}, which is "
            f"not installed ({error}); pip install 'megatron_npd[{extra}]'"
        ) from None


def refuse_path(evaluation: EvaluationConfig) -> None:
    """A task that makes its own problems reads none."""
    for key in ("path", "wrap"):
        if value := getattr(evaluation, key):
            raise UserError(
                f"evaluation.{key} = {value!r} of {evaluation.name}: must be left out; the task {evaluation.task} "
                "makes its own problems"
            )


def where_options(evaluation: EvaluationConfig) -> str:
    """How messages name a task's own keys."""
    return f"evaluation.options of {evaluation.name}"
