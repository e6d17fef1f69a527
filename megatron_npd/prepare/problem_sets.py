"""The problems of a run's evaluations: made by their tasks, framed as training prompts are, checked, and kept.

A run may be given further evaluations when it is started again. What one asks must not change once there are results of
it: figures of two versions would not be comparable.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.config import Config, EvaluationConfig, PromptsConfig
from megatron_npd.data.framing import Framer
from megatron_npd.data.prompt_rows import Prompt
from megatron_npd.data.prompts import TRAIN, PromptPart, part_rows
from megatron_npd.data.rows import HUB
from megatron_npd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_npd.errors import GraderError, UserError
from megatron_npd.models.hf_config import eos_token_ids
from megatron_npd.prepare.fingerprints import fingerprint_of_path
from megatron_npd.prepare.prompt_parts import hash_of, normalised, part_of
from megatron_npd.prepare.tokenise import TokenisedPrompts, tokenised
from megatron_npd.run_directory import RunDirectory
from megatron_npd.tasks.evaluation_task import Answer, EvaluationTask, Problem
from megatron_npd.tasks.problem_set import define, definition_of, save_problems
from megatron_npd.tasks.registry import make_task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FramedProblems:
    """An evaluation that passed its checks."""

    evaluation: EvaluationConfig
    task: EvaluationTask
    problems: list[Problem]
    prompts: PromptPart

    def __str__(self) -> str:
        lengths = self.prompts.lengths
        return f"{len(self.problems)} problems, {lengths.sum()} tokens, the longest {lengths.max()}"

    def save(self, folder: Path) -> None:
        """Write them into a run directory."""
        save_problems(folder, _definition(self.evaluation), self.problems, self.prompts)


def framed_problems(
    config: Config,
    evaluation: EvaluationConfig,
    tokenizer: Tokenizer,
    end_ids: list[int],
    train: TokenisedPrompts | None,
) -> FramedProblems:
    """The problems of an evaluation, as the models will see them; says what is worth saying about them.

    Args:
        train: the training prompts, of which none may be a problem; None: there is no training.

    Raises:
        UserError: the task refuses its keys or its data, a problem is too long or trained on, or nothing is graded.
    """
    task = make_task(config, evaluation)
    problems = task.problems(evaluation.problems)
    prompts = [_prompt_of(problem, config.prompts) for problem in problems]
    framer = Framer(tokenizer, config.prompts.format, end_ids)
    framed, notes = framer.frame(
        prompts, lambda prompt, what: UserError(f"{_where(evaluation)}: problem {prompt.name!r}: {what}")
    )
    part = part_of(prompts, framed)
    for line in notes.lines():
        logger.warning("%s: %s", _where(evaluation), line)
    kept = _not_too_long(config, evaluation, part)
    if train is not None:
        kept &= _not_trained_on(evaluation, prompts, train)
    if not kept.any():
        raise UserError(f"{_where(evaluation)}: no problem is left; must be at least one")
    part, problems = part_rows(part, kept), list(compress(problems, kept))
    _try_grading(evaluation, task, problems[0])
    return FramedProblems(evaluation, task, problems, part)


def complete_problems(run: RunDirectory, config: Config) -> None:
    """Make what a prepared run does not have yet of its evaluations' problems, and refuse what it must not have.

    Raises:
        UserError: see `framed_problems`; or an evaluation that has results asks something else now.
    """
    tokenizer, train = None, None
    for evaluation in config.evaluation:
        make_task(config, evaluation)  # who grades must have its libraries
        before, now = definition_of(run.problems(evaluation.name)), _definition(evaluation)
        if _are_same(before, now):
            continue
        if before is not None and any(run.results(evaluation.name).glob("*.json")):
            key = next(key for key in now | before if before.get(key) != now.get(key))
            what = "the content of the path" if key == "content" else f"evaluation.{key} = {getattr(evaluation, key)!r}"
            raise UserError(
                f"{what} of {evaluation.name}: there are results of it from before this was changed, in "
                f"{run.results(evaluation.name)}; give the evaluation another name, or remove these"
            )
        if tokenizer is None:
            student = Path(config.models.student)
            tokenizer = load_tokenizer(student, trust_remote_code=config.models.trust_remote_code)
            train = tokenised(config, TRAIN, tokenizer, eos_token_ids(student))
        framed_problems(config, evaluation, tokenizer, eos_token_ids(Path(config.models.student)), train).save(
            run.problems(evaluation.name)
        )


def is_prepared(run: RunDirectory, evaluation: EvaluationConfig) -> bool:
    """Whether a run directory has the problems of just this evaluation."""
    return _are_same(definition_of(run.problems(evaluation.name)), _definition(evaluation))


def save_all(run: RunDirectory, sets: Iterable[FramedProblems]) -> None:
    """Write all problems of a new run."""
    for one in sets:
        one.save(run.problems(one.evaluation.name))


def _definition(evaluation: EvaluationConfig) -> dict[str, Any]:
    path = evaluation.path
    on_disk = path and not path.startswith(HUB) and Path(path).exists()
    return define(evaluation, fingerprint_of_path(Path(path)) if on_disk else None)


def _are_same(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Whether problems that were made are those that are wanted. A file that is gone is no other file."""
    if before is None:
        return False
    return before == (now | {"content": before["content"]} if now["content"] is None else now)


def _where(evaluation: EvaluationConfig) -> str:
    return f"evaluation {evaluation.name}"


def _prompt_of(problem: Problem, config: PromptsConfig) -> Prompt:
    """A problem as a prompt like those of `RowReader`."""
    if isinstance(problem.prompt, Prompt):
        return problem.prompt
    if config.format == "text":
        return Prompt(problem.name, text=problem.prompt)
    system = [{"role": "system", "content": config.system}] if config.system else []
    said = [*system, {"role": "user", "content": problem.prompt}]
    return Prompt(problem.name, said, template_kwargs=config.chat_template_kwargs)


def _not_too_long(config: Config, evaluation: EvaluationConfig, part: PromptPart) -> np.ndarray:
    """bool [n]; refuses a problem that is too long unless such are to be left out."""
    limit = config.prompts.max_prompt_tokens
    fits = part.lengths <= limit
    if not fits.all():
        first, count = int(np.argmin(fits)), int((~fits).sum())
        what = (
            f"{_where(evaluation)}: problem {part.names[first]!r} has {part.lengths[first]} tokens; must not exceed "
            f"prompts.max_prompt_tokens = {limit}" + (f" ({count} such problems)" if count > 1 else "")
        )
        if config.prompts.too_long == "refuse":
            raise UserError(f"{what}; prompts.too_long = 'leave_out' leaves such out")
        logger.warning("%s: left out", what)
    return fits


def _not_trained_on(evaluation: EvaluationConfig, prompts: list[Prompt], train: TokenisedPrompts) -> np.ndarray:
    """bool [n]; refuses a problem that is a training prompt to the letter unless such are to be left out."""
    said, meant = (np.concatenate([getattr(part, which) for part in train.parts()]) for which in ("said", "meant"))
    same = np.isin(np.array([hash_of(prompt.words) for prompt in prompts], np.uint64), said)
    alike = np.isin(np.array([hash_of(normalised(prompt.words)) for prompt in prompts], np.uint64), meant) & ~same
    if alike.any():
        logger.warning(
            "%s: %d problems differ from a prompt in %s in case, spaces or a last stop alone; the first is %r",
            _where(evaluation), alike.sum(), train.path, prompts[int(np.argmax(alike))].name,
        )  # fmt: skip
    if same.any():
        first = prompts[int(np.argmax(same))]
        what = f"{_where(evaluation)}: problem {first.name!r} has the text of a prompt in {train.path}"
        more = f" ({same.sum()} such problems)" if same.sum() > 1 else ""
        if evaluation.overlap == "refuse":
            raise UserError(
                f"{what}; problems must not be trained on{more}; evaluation.overlap = 'leave_out' leaves such out"
            )
        logger.warning("%s%s: left out", what, more)
    return ~same


def _try_grading(evaluation: EvaluationConfig, task: EvaluationTask, problem: Problem) -> None:
    """Grade an empty answer: what keeps a grader from working is found before anything runs."""
    try:
        task.grade([Answer(Problem(problem.name, problem.question, problem.reference), "")])
    except GraderError as error:
        raise UserError(f"{_where(evaluation)}: an empty answer cannot be graded: {error}") from None
