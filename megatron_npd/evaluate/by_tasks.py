"""Subjects answer evaluations in this process, by the engine that sidecars have."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.config import Config, EvaluationConfig, apply_override, validated
from megatron_npd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_npd.errors import UserError
from megatron_npd.evaluate.subjects import Asked, Subject
from megatron_npd.files import read_json, write_atomically
from megatron_npd.models.hf_config import eos_token_ids
from megatron_npd.prepare.dtype import decide_dtype
from megatron_npd.prepare.problem_sets import framed_problems, is_prepared
from megatron_npd.rollout.answering import ANSWERS_SUFFIX, Examination, Examined, examination_of, examine
from megatron_npd.rollout.parity import check_parity
from megatron_npd.schema import TEACHER_VERSION
from megatron_npd.tasks.intervals import in_words
from megatron_npd.versions.manifest import read_parity_probe
from megatron_npd.vllm_engine.engine import RolloutEngine


def evaluations_asked(place: Asked, tasks: list[str], keys: dict[str, Any], more: list[str]) -> list[EvaluationConfig]:
    """Which evaluations the command line means.

    Args:
        tasks: names of the run's evaluations, or of tasks; none: all evaluations of the run.
        keys: of `[[evaluation]]`, over what the run says.
        more: further ones, as `KEY=VALUE`.

    Raises:
        UserError: there is none, or a key is wrong.
    """
    tables = {one.name: one for one in place.config.evaluation}
    if not tasks and not tables:
        raise UserError("--task: missing; names a task" + (", for this run has no [[evaluation]]" if place.run else ""))
    asked = []
    for name in tasks or tables:
        raw = tables[name].model_dump(exclude_defaults=True) if name in tables else {"task": name}
        raw |= {"name": name} | keys
        for override in more:
            apply_override(raw, override, "--with")
        asked.append(validated(EvaluationConfig, raw, f"--task {name}"))
    return asked


@dataclass(frozen=True)
class ByTasks:
    """Some evaluations of the subjects of a place."""

    place: Asked
    evaluations: list[EvaluationConfig]

    def results(self) -> Iterator[tuple[Subject, Examined]]:
        """One subject after another. What a run's own evaluations have found already is found there, and what they find
        is kept there."""
        engine: RolloutEngine | None = None
        for subject in self.place.subjects:
            for evaluation in self.evaluations:
                kept = self._kept_in(evaluation, subject)
                if kept and kept.is_file():
                    yield subject, _read(kept)
                    continue
                examination = self._examinations[evaluation.name]
                engine = self._serve(engine, subject)
                called = subject.version if self.place.run else str(subject.folder)
                if subject.version == TEACHER_VERSION and self.place.run:
                    called = "teacher"
                done = examine(examination, engine, called, contextlib.nullcontext)
                if kept:
                    done.save(kept)
                yield subject, done

    @cached_property
    def _config(self) -> Config:
        config = self.place.config.model_copy(update={"evaluation": self.evaluations})
        return decide_dtype(config) if config.models.dtype == "auto" else config

    @cached_property
    def _examinations(self) -> dict[str, Examination]:
        """By name; all are made before an engine starts, so that what is wrong is said at once."""
        return {one.name: self._examination(one) for one in self.evaluations}

    def _examination(self, evaluation: EvaluationConfig) -> Examination:
        config, run = self._config, self.place.run
        if run and is_prepared(run, evaluation):
            return examination_of(run, config, evaluation.name, self._stop_ids, self._tokenizer)
        framed = framed_problems(config, evaluation, self._tokenizer, self._stop_ids, train=None)
        ids = np.split(framed.prompts.ids, np.cumsum(framed.prompts.lengths)[:-1])
        asked = [replace(problem, prompt=problem.question) for problem in framed.problems]
        limit = config.answer_tokens(evaluation)
        return Examination(evaluation, framed.task, asked, ids, limit, self._stop_ids, self._tokenizer)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._whose, trust_remote_code=self.place.config.models.trust_remote_code)

    @property
    def _stop_ids(self) -> list[int]:
        return eos_token_ids(self._whose)

    @property
    def _whose(self) -> Path:
        """The checkpoint whose tokenizer and end tokens count: a teacher may have more of both than its student."""
        models, subject = self.place.config.models, self.place.subjects[0]
        return subject.folder if subject.version == TEACHER_VERSION else Path(models.student)

    def _kept_in(self, evaluation: EvaluationConfig, subject: Subject) -> Path | None:
        """Where a run keeps this result: of what it asks itself."""
        run = self.place.run
        return run.result(evaluation.name, subject.version) if run and is_prepared(run, evaluation) else None

    def _serve(self, engine: RolloutEngine | None, subject: Subject) -> RolloutEngine:
        """An engine that serves a subject: the one there is, moved on, or the first."""
        if engine and engine.version == subject.version:
            return engine
        config, rollout = self._config, self._config.rollout
        if engine is None:
            engine = RolloutEngine(
                subject.folder,
                subject.version,
                rollout,
                config.models.dtype,
                config.longest_sequence,
                config.models.trust_remote_code,
            )
        else:
            with engine.stage(subject.folder, subject.version) as staged:
                engine.refresh(staged)
        if subject.version != TEACHER_VERSION:
            check_parity(engine, read_parity_probe(subject.folder), rollout)
        return engine


def evaluate_by_tasks(
    place: Asked, evaluations: list[EvaluationConfig], output: Path | None, say: Callable[[str], None]
) -> None:
    """Say what every subject scores, as soon as it is known; `output`: a file for all answers, JSON lines.

    Raises:
        UserError: an evaluation is refused.
        GraderError, RolloutError: one failed.
    """
    lines: list[str] = []
    for subject, done in ByTasks(place, evaluations).results():
        by = f" by {subject.called}" if subject.called else ""
        say(f"{done.result['name']}{by}: {in_words(done.result)}")
        known = {"evaluation": done.result["name"], "version": done.result["version"]}
        lines += [json.dumps(known | answer, ensure_ascii=False) + "\n" for answer in done.answers]
        if output:
            write_atomically(output, "".join(lines).encode())


def _read(path: Path) -> Examined:
    """A result that is kept, and its answers."""
    answers = path.with_suffix(ANSWERS_SUFFIX).read_text(encoding="utf-8").splitlines()
    return Examined(read_json(path), [json.loads(line) for line in answers])
