"""The sidecar's other work: evaluations of the version that it serves, while nothing is to be sampled with it."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_npd.buffer.evaluations import Exam, exams_of, is_answered, is_taken, open_exams, taking
from megatron_npd.buffer.role_context import RoleContext
from megatron_npd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_npd.process.memory import release_unused
from megatron_npd.process.waiting import wait_for
from megatron_npd.rollout.answering import Examined, examination_of, examine
from megatron_npd.schema import Event
from megatron_npd.tasks.intervals import in_words
from megatron_npd.vllm_engine.engine import RolloutEngine

logger = logging.getLogger(__name__)


class Examiner:
    """Asks each version what it is to be asked, unless another worker does or has."""

    def __init__(self, context: RoleContext, stop_ids: list[int]):
        self._context, self._stop_ids = context, stop_ids
        self._tokenizer: Tokenizer | None = None

    def left(self) -> list[Exam]:
        """Without a result, by version, whoever works on them."""
        return open_exams(self._context.run, self._context.plan)

    def wants(self, version: int) -> bool:
        """Whether a version has something to answer that nobody is at."""
        run, config = self._context.run, self._context.config
        return any(not is_taken(run, config, exam) for exam in self._left_of(version))

    def examine(self, engine: RolloutEngine) -> None:
        """Ask the version that is served, one evaluation after another."""
        run, config = self._context.run, self._context.config
        for exam in self._left_of(engine.version):
            with taking(run, config, exam) as is_ours:
                if is_ours:
                    self._examine(engine, exam)

    def wait_for_others(self, left: list[Exam]) -> None:
        """Return when one of these, which others are at, has its result, or when nobody is at it any more."""
        run, config = self._context.run, self._context.config
        wait_for(
            "other workers to finish evaluations",
            lambda: any(is_answered(run, exam) or not is_taken(run, config, exam) for exam in left) or None,
            config.launch.poll_seconds,
        )

    def _left_of(self, version: int) -> list[Exam]:
        """Of one version alone: a run may have thousands."""
        of_version = (exam for exam in exams_of(self._context.plan) if exam.version == version)
        return [exam for exam in of_version if not is_answered(self._context.run, exam)]

    def _examine(self, engine: RolloutEngine, exam: Exam) -> None:
        run, config = self._context.run, self._context.config
        if self._tokenizer is None:
            student, trust = Path(config.models.student), config.models.trust_remote_code
            self._tokenizer = load_tokenizer(student, trust_remote_code=trust)
        examination = examination_of(run, config, exam.evaluation, self._stop_ids, self._tokenizer)
        done = examine(examination, engine, exam.version, self._context.turn)
        done.save(run.result(exam.evaluation, exam.version))
        self._report(done)
        release_unused()

    def _report(self, done: Examined) -> None:
        figures = done.result
        tokens = sum(answer["response_tokens"] for answer in done.answers)
        self._context.log(
            Event.ANSWERS,
            evaluation=figures["name"],
            response_tokens=tokens,
            **{key: figures[key] for key in ("version", "problems", "samples", "correct", "accuracy", "seconds")},
        )
        logger.info(
            "%s by version %d: %s, %.1f s", figures["name"], figures["version"], in_words(figures), figures["seconds"]
        )
        self._context.log(Event.MEMORY, **self._context.memory.record())
