"""Problems answered by an engine, graded by their task, and kept: what a version, or any checkpoint, scores.

Answers are sampled in a batch of their own, each by a seed of its own, so that they are a function of the weights and
of the evaluation; on a CPU to the last bits, on a GPU to rounding (`deterministic`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.buffer.plan import sampling_seed
from megatron_npd.config import Config, EvaluationConfig
from megatron_npd.data.prompts import PromptSet, load_prompt_set
from megatron_npd.data.tokenizer import Tokenizer
from megatron_npd.files import create_atomically, write_atomically
from megatron_npd.process.activity import doing
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import FinishReason
from megatron_npd.tasks.evaluation_task import Answer, EvaluationTask, Grade, Problem
from megatron_npd.tasks.intervals import wilson
from megatron_npd.tasks.problem_set import load_problems
from megatron_npd.tasks.registry import make_task
from megatron_npd.vllm_engine.engine import Request, Response, RolloutEngine

SLICE_SECONDS = 5.0
"""After so long another role of a machine with few cores may have its turn: nothing waits for an evaluation."""
YIELD_SECONDS = 0.02
"""Who asks for the turn again at once gets it before those who wait."""
ANSWERS_SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Examination:
    """Everything an evaluation needs but the engine."""

    evaluation: EvaluationConfig
    task: EvaluationTask
    problems: list[Problem]
    prompts: Sequence[np.ndarray] | PromptSet
    """Token ids of each."""
    max_new_tokens: int
    stop_ids: list[int]
    tokenizer: Tokenizer

    def requests(self) -> list[Request]:
        """What is asked, problem by problem, and of each as often as there are samples."""
        one = self.evaluation
        return [
            Request(
                prompt_ids=self.prompts[index].tolist(),
                seed=sampling_seed(one.seed, f"evaluation/{one.name}", index, sample),
                max_new_tokens=self.max_new_tokens,
                stop_token_ids=self.stop_ids,
                temperature=one.temperature,
                top_p=one.top_p,
            )
            for index in range(len(self.problems))
            for sample in range(one.samples_per_problem)
        ]

    def text(self, response: Response) -> str:
        """What was said, without the token that ended it."""
        ended = response.finish_reason is FinishReason.STOP
        return self.tokenizer.decode(response.ids[: len(response.ids) - ended])


def examination_of(
    run: RunDirectory, config: Config, name: str, stop_ids: list[int], tokenizer: Tokenizer
) -> Examination:
    """An evaluation of a prepared run.

    Raises:
        UserError: its problems are not there, or its task refuses its keys.
    """
    evaluation = next(one for one in config.evaluation if one.name == name)
    folder = run.problems(name)
    problems = load_problems(folder)
    task, limit = make_task(config, evaluation), config.answer_tokens(evaluation)
    return Examination(evaluation, task, problems, load_prompt_set(folder), limit, stop_ids, tokenizer)


@dataclass(frozen=True)
class Examined:
    """What came of it."""

    result: dict[str, Any]
    """Figures: task, name, version, problems, samples, correct, accuracy, wilson_95 [low, high],
    mean_response_tokens, truncated (share cut by the length limit), seconds."""
    answers: list[dict[str, Any]]
    """Of each answer: problem, sample, prompt, response, extracted, reference, correct, response_tokens, truncated."""

    def save(self, path: Path) -> bool:
        """Keep both, the answers first: where the figures are, the answers are. What is there stays; then False."""
        if path.is_file():
            return False
        write_atomically(path.with_suffix(ANSWERS_SUFFIX), self.lines().encode())
        text = json.dumps(self.result, indent=2) + "\n"
        return create_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def lines(self) -> str:
        """The answers as JSON lines."""
        return "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in self.answers)


def examine(
    exam: Examination, engine: RolloutEngine, called: int | str, turn: Callable[[], AbstractContextManager[None]]
) -> Examined:
    """Have an engine answer, and grade what it said.

    Args:
        called: what the results say was examined, a version or a name.
        turn: gives the right to compute (`RoleContext.turn`).

    Raises:
        RolloutError: the engine failed.
        GraderError: the answers cannot be graded.
    """
    since = time.monotonic()
    name, per_problem = exam.evaluation.name, exam.evaluation.samples_per_problem
    with doing(f"answering {name}"):
        responses = _answers(engine, exam.requests(), turn)
    seconds = time.monotonic() - since
    problems = [problem for problem in exam.problems for _ in range(per_problem)]
    answers = [Answer(problem, exam.text(each)) for problem, each in zip(problems, responses, strict=True)]
    with doing(f"grading {name}"):
        grades = exam.task.grade(answers)
    samples = [index % per_problem for index in range(len(answers))]
    rows = [_row(*one) for one in zip(answers, samples, responses, grades, strict=True)]
    figures = {"task": exam.evaluation.task, "name": name, "version": called, **score(rows, len(exam.problems))}
    return Examined(figures | {"seconds": seconds}, rows)


def score(answers: list[dict[str, Any]], problems: int) -> dict[str, Any]:
    """The figures of graded answers.

    Samples of one problem are not independent: the interval is that of as many trials as there are problems.
    """
    correct = sum(answer["correct"] for answer in answers)
    accuracy = correct / len(answers)
    return {
        "problems": problems,
        "samples": len(answers),
        "correct": correct,
        "accuracy": accuracy,
        "wilson_95": list(wilson(accuracy * problems, problems)),
        "mean_response_tokens": float(np.mean([answer["response_tokens"] for answer in answers])),
        "truncated": float(np.mean([answer["truncated"] for answer in answers])),
    }


def _answers(
    engine: RolloutEngine, requests: list[Request], turn: Callable[[], AbstractContextManager[None]]
) -> list[Response]:
    tickets = [engine.begin(request) for request in requests]
    responses: dict[int, Response] = {}
    while engine.running:
        with turn():
            until = time.monotonic() + SLICE_SECONDS
            while engine.running and time.monotonic() < until:
                responses |= engine.step()
        time.sleep(YIELD_SECONDS)
    return [responses[ticket] for ticket in tickets]


def _row(answer: Answer, sample: int, response: Response, grade: Grade) -> dict[str, Any]:
    return {
        "problem": answer.problem.name,
        "sample": sample,
        "prompt": answer.problem.question,
        "response": answer.response,
        "extracted": grade.extracted,
        "reference": answer.problem.reference,
        "correct": grade.correct,
        "response_tokens": len(response.ids),
        "truncated": response.finish_reason is FinishReason.LENGTH,
    }
