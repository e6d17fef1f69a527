"""Procedural problems of reasoning-gym: made from a seed, as many as one likes, never seen in any training data."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from megatron_npd.config import Config, EvaluationConfig, Section, validated
from megatron_npd.errors import GraderError, UserError
from megatron_npd.tasks.evaluation_task import PROBLEMS, Answer, Grade, Problem, refuse_path, require, where_options

logger = logging.getLogger(__name__)

INSTRUCTION = (
    "Give the final answer, and nothing but it, between <answer> and </answer>, in the form in which the examples have "
    "it where there are some."
)
"""What follows every question: reasoning-gym's scorers compare what stands between these tags."""


class ReasoningGymOptions(Section):
    """`evaluation.options` of the task `reasoning_gym`."""

    dataset: str
    """Name of one of its data sets, e.g. chain_sum."""
    config: dict[str, Any] = Field(default_factory=dict)
    """That data set's own settings, e.g. `{ min_terms = 2, max_terms = 3 }`; size and seed are the evaluation's."""
    instruction: str = INSTRUCTION
    """Follows every question. Without one ("") a response without tags is an answer as a whole."""


class ReasoningGym:
    """An answer is right if the data set's own scorer gives it the full mark."""

    def __init__(self, config: Config, evaluation: EvaluationConfig):
        refuse_path(evaluation)
        where = where_options(evaluation)
        self._options = options = validated(ReasoningGymOptions, evaluation.options, where)
        self._library: Any = require("reasoning_gym", evaluation)
        datasets = require("reasoning_gym.factory", evaluation).DATASETS
        if options.dataset not in datasets:
            near = difflib.get_close_matches(options.dataset, datasets, n=1, cutoff=0.0)
            raise UserError(f"{where}: dataset = {options.dataset!r}: no such data set; did you mean {near[0]}?")
        if set_elsewhere := sorted(options.config.keys() & {"size", "seed"}):
            raise UserError(
                f"{where}: config.{set_elsewhere[0]}: must be left out; the evaluation's problems and seed are"
            )
        size = evaluation.problems or PROBLEMS
        try:
            self._dataset = self._library.create_dataset(
                options.dataset, size=size, seed=evaluation.seed, **options.config
            )
        except (AssertionError, TypeError, ValueError, KeyError) as error:  # what its own checks raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{where}: config = {options.config}: {options.dataset} refuses it: {reason}") from None

    def problems(self, count: int) -> list[Problem]:
        return [
            self._problem(index) for index in range(min(count, len(self._dataset)) if count else len(self._dataset))
        ]

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        return [self._grade(answer) for answer in answers]

    def _problem(self, index: int) -> Problem:
        """Its reference is where it is found again: what a scorer needs besides may be more than JSON can hold."""
        entry = self._dataset[index]
        said = "\n\n".join(text for text in (entry["question"], self._options.instruction) if text)
        return Problem(f"{self._options.dataset}-{index}", said, {"index": index, "answer": entry["answer"]})

    def _grade(self, answer: Answer) -> Grade:
        problem, index = answer.problem, answer.problem.reference["index"]
        entry = self._dataset[index]
        if entry["answer"] != problem.reference["answer"]:
            raise GraderError(
                f"{problem.name}: reasoning-gym makes another problem of this seed than when the run was prepared; "
                "was it updated since?"
            )
        extracted = self._library.utils.extract_answer(answer.response)
        if extracted is None and not self._options.instruction:
            extracted = answer.response.strip()
        try:
            mark = float(self._dataset.score_answer(extracted, entry)) if extracted is not None else 0.0
        except Exception as error:  # scorers read what a model wrote; what they make of nonsense is no fault of the run
            logger.warning("%s: the scorer fails on %r: %s; counted as wrong", problem.name, extracted, error)
            mark = 0.0
        return Grade(mark >= 1.0, extracted)
