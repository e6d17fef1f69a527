"""The annotator: scores, judges and annotates what the sidecars sampled, and evaluates what the trainer published.

Every rank of one annotator runs `run`; rank 0 looks for work, leases it and writes. A `Task` is computed by all ranks.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_npd.buffer.leases import lease
from megatron_npd.buffer.listing import finished_units, is_finished
from megatron_npd.buffer.plan import Stage
from megatron_npd.buffer.retention import is_trained
from megatron_npd.buffer.role_context import RoleContext
from megatron_npd.buffer.shards import Shard, read_or_quarantine, read_shard, write_shard
from megatron_npd.config import Config
from megatron_npd.data.tokenizer import load_tokenizer
from megatron_npd.distributed.collectives import broadcast_object
from megatron_npd.distributed.together import wait_together
from megatron_npd.errors import UserError
from megatron_npd.files import write_json
from megatron_npd.mcore.acceleration import choose_layers
from megatron_npd.mcore.attention import choose_backend
from megatron_npd.mcore.model import ModelOptions
from megatron_npd.mcore.model_parallel import initialize, shutdown
from megatron_npd.models.hf_config import eos_token_ids, read_model_dims
from megatron_npd.process.activity import doing
from megatron_npd.process.memory import release_unused
from megatron_npd.roles import ANNOTATOR
from megatron_npd.run_directory import HELDOUT_STAGE
from megatron_npd.schema import GIVEN_VERSION, TEACHER_VERSION, Event, Verdict
from megatron_npd.selection.rule import SelectionRule
from megatron_npd.selection.rules import rule_of
from megatron_npd.teacher.annotation import annotate_shard
from megatron_npd.teacher.earlier_round import deltas_of
from megatron_npd.teacher.heldout import HeldoutSet
from megatron_npd.teacher.prefill import PrefillModel
from megatron_npd.teacher.prefix import unconditional_prefix
from megatron_npd.versions.manifest import published_versions, verified

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A unit to annotate, or (stage None) a version to evaluate."""

    stage: str | None
    unit: int = 0
    version: int = 0


def run(config: Config) -> None:
    """Work until every stage is annotated and every version that the plan wants evaluated is."""
    try:
        annotator = Annotator(config)
        while (task := annotator.next_task()) is not None:
            with annotator.leased(task) as held:
                if not held:
                    annotator.passed_over.add(task)
                elif task.stage is None:
                    annotator.evaluate(task.version)
                else:
                    annotator.annotate(annotator.plan.stages[task.stage], task.unit)
    finally:
        shutdown()


class Annotator:
    """Teacher and student snapshot, side by side."""

    def __init__(self, config: Config):
        self.context = context = RoleContext(config, ANNOTATOR)
        self.config, self.run, self.plan = config, context.run, context.plan
        torch.set_num_threads(config.annotator.threads)
        self.parallel = initialize(
            config.annotator.tensor_model_parallel_size, seed=config.seed, deterministic=config.deterministic
        )
        dtype, chunk_tokens = getattr(torch, config.models.dtype), config.training.logits_chunk_tokens
        options = ModelOptions(
            choose_backend(config.training.attention_backend, dtype), acceleration=choose_layers(config.training)
        )
        of_teacher, of_student = (
            load_tokenizer(Path(folder), trust_remote_code=config.models.trust_remote_code)
            for folder in (config.models.teacher, config.models.student)
        )
        rows = [read_model_dims(folder).vocab_size for folder in (config.models.teacher, config.models.student)]
        self.vocabulary, *own = _vocabularies(_common_rows(*rows), of_teacher.ids, of_student.ids)
        self.teacher, self.student = (
            PrefillModel(folder, self.parallel, dtype, options, self.vocabulary, chunk_tokens, ids, max(rows))
            for folder, ids in zip((config.models.teacher, config.models.student), own, strict=True)
        )
        self.student_version: int | None = None
        start_from = config.selection.unconditional_prefix
        self.prefix = np.array(unconditional_prefix(of_student, start_from, config.prompts.format), dtype=np.int32)
        self.end_tokens = eos_token_ids(config.models.student)
        self.heldout: HeldoutSet | None = None
        self._to_evaluate = set(self.plan.evaluated)
        """Versions without held-out figures, at the last look."""
        self._left_behind: set[str] = set()
        """Stages that are trained on."""
        self._rule_of_stage: tuple[str, SelectionRule] | None = None
        """Name of the stage that was annotated last, and the rule for it."""
        self.passed_over: set[Task] = set()
        """Tasks another annotator was working on when this one came by; looked at again when nothing else is left."""
        if self.parallel.rank == 0:
            context.open_metrics()
        seconds = time.monotonic() - context.started
        context.log(
            Event.START,
            import_seconds=context.import_seconds,
            seconds=seconds,
            attention_backend=options.attention_backend,
        )

    def next_task(self) -> Task | None:
        """The next thing to do, the same on every rank; None when the run needs no annotator any more."""
        wanted = "rollouts to annotate or a version to evaluate"
        found = wait_together(self.parallel, wanted, self._look, self.config.launch.poll_seconds)
        return found if isinstance(found, Task) else None

    def annotate(self, stage: Stage, unit: int) -> None:
        """Score, judge and annotate one rollout shard into a sample shard."""
        shard = self._read_rollouts(stage, unit)
        if shard is None:
            return
        with doing(f"annotating {stage.name}, unit {unit + 1} of {stage.units}"), self._turn():
            started = time.monotonic()
            version = stage.version_of(unit)
            judged = version not in (TEACHER_VERSION, GIVEN_VERSION)
            rule = self._rule(stage)
            if judged and rule.looks_at_scores:
                self._use_student(version)
            student = self.student if judged else None
            ends = frozenset(self.end_tokens)
            samples, tokens = annotate_shard(
                shard, self.config, rule, self.teacher, student, self.prefix, ends, self.vocabulary
            )
            seconds = time.monotonic() - started
        if self.parallel.rank == 0:
            write_shard(self.run.unit("samples", stage.name, unit), samples)
            self._report_unit(stage, unit, samples, tokens, seconds)
        self._look_at_memory()

    def evaluate(self, version: int) -> None:
        """Held-out figures of a published version, into evaluation/."""
        heldout = self._heldout_set()
        if heldout is None:
            return
        with doing(f"evaluating version {version}"), self._turn():
            started = time.monotonic()
            self._use_student(version)
            figures = heldout.evaluate(self.student)
            seconds = time.monotonic() - started
        if self.parallel.rank == 0:
            write_json(self.run.evaluation(version), {"version": version, **asdict(figures)})
            self.context.log(Event.EVALUATION, version=version, seconds=seconds, **asdict(figures))
            logger.info("version %d: held-out KL %.4f nats/token", version, figures.heldout_kl)
            if heldout.kept_packs < len(heldout):
                logger.info(
                    "the teacher reads %d of %d held-out packs again for every version: annotator.heldout_cache_gib = "
                    "%g holds no more", len(heldout) - heldout.kept_packs, len(heldout),
                    self.config.annotator.heldout_cache_gib,
                )  # fmt: skip
        self._look_at_memory()

    @contextlib.contextmanager
    def leased(self, task: Task) -> Iterator[bool]:
        """Hold the task's lease (on rank 0, for all ranks) while it is worked on."""
        path = (
            self.run.lease("evaluation", "versions", task.version)
            if task.stage is None
            else self.run.lease("samples", task.stage, task.unit)
        )
        if self.parallel.rank == 0:
            with lease(path, self.config.launch.lease_seconds) as held:
                yield bool(broadcast_object(held is not None))
        else:
            yield bool(broadcast_object(None))

    def _look(self) -> Task | str | None:
        """A task, "done", or None: nothing yet."""
        tasks = list(self._open_tasks())
        free = next((task for task in tasks if task not in self.passed_over), None)
        if free is None:
            self.passed_over.clear()
        finished = not tasks and not self._to_evaluate and self._all_annotated()
        return "done" if finished else free

    def _open_tasks(self) -> Iterator[Task]:
        """First units, which the trainer may be waiting for, then evaluations."""
        for stage in self._stages_under_way():
            rolled_out = finished_units(self.run, "rollouts", stage)
            for unit in sorted(rolled_out - finished_units(self.run, "samples", stage)):
                yield Task(stage.name, unit)
        if self._to_evaluate and self._heldout_is_complete():
            done = {version for version in self._to_evaluate if self.run.evaluation(version).exists()}
            self._to_evaluate -= done
            for version in sorted(self._to_evaluate.intersection(published_versions(self.run))):
                yield Task(None, version=version)

    def _stages_under_way(self) -> Iterator[Stage]:
        """Stages that may have something to annotate: looked at again and again, so a run of many rounds must not look
        at all of them. What the trainer has left behind is done for good; a round whose version is to come has not
        begun."""
        for stage in self.plan.training_stages:
            if stage.name in self._left_behind:
                continue
            if is_trained(self.run, stage.name):
                self._left_behind.add(stage.name)
            elif stage.version == TEACHER_VERSION or self.run.version(stage.version).is_dir():
                yield stage

    def _all_annotated(self) -> bool:
        return all(is_finished(self.run, "samples", stage) for stage in self.plan.training_stages)

    def _read_rollouts(self, stage: Stage, unit: int) -> Shard | None:
        """A verified rollout shard on every rank; None if it was corrupt (rank 0 set it aside)."""
        path = self.run.unit("rollouts", stage.name, unit)
        good = read_or_quarantine(path, "rollouts") is not None if self.parallel.rank == 0 else None
        return read_shard(path, "rollouts") if broadcast_object(good) else None

    def _rule(self, stage: Stage) -> SelectionRule:
        """The rule for a stage: a function of the configuration and of the round before, which is finished."""
        if self._rule_of_stage is None or self._rule_of_stage[0] != stage.name:
            rounds = [one.name for one in self.plan.round_stages]
            first = stage.name not in rounds[1:] or not self.config.selection.tau_quantile
            earlier = None if first else deltas_of(self.run, self.plan.stages[rounds[rounds.index(stage.name) - 1]])
            self._rule_of_stage = stage.name, rule_of(self.config.selection, earlier)
        return self._rule_of_stage[1]

    def _use_student(self, version: int) -> None:
        """Make the student snapshot that of `version`, verified before it is loaded."""
        if self.student_version == version:
            return
        started = time.monotonic()
        folder = self.run.version(version)
        with verified(folder, version):
            self.student.load(folder)
        self.student_version = version
        self.context.log(Event.REFRESH, version=version, seconds=time.monotonic() - started)

    def _heldout_set(self) -> HeldoutSet | None:
        """The held-out set, read once; None if a shard was corrupt."""
        if self.heldout is None and (pairs := self._heldout_pairs()) is not None:
            sizes = self.config.annotator
            self.heldout = HeldoutSet(self.teacher, pairs, sizes.pack_length, sizes.heldout_cache_gib * 2**30)
        return self.heldout

    def _heldout_is_complete(self) -> bool:
        return is_finished(self.run, "rollouts", self.plan.stages[HELDOUT_STAGE])

    def _heldout_pairs(self) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """(prompt, response) of the held-out set; None if a shard was corrupt. Left out are empty responses, and those
        with an id that one of the two models does not have (the teacher may sample one of its padding rows)."""
        stage, pairs = self.plan.stages[HELDOUT_STAGE], []
        for unit in range(stage.units):
            shard = self._read_rollouts(stage, unit)
            if shard is None:
                return None
            pairs += [(shard.prompt(row), shard.response(row)) for row in range(len(shard))]
        usable = [pair for pair in pairs if len(pair[1]) and max(ids.max() for ids in pair) < self.vocabulary]
        if not usable:
            raise UserError(
                f"{self.run.root}: all {len(pairs)} held-out responses are empty or hold ids that one of the models "
                "does not have; must be at least one that both can score"
            )
        return usable

    def _report_unit(self, stage: Stage, unit: int, samples: Shard, tokens: int, seconds: float) -> None:
        counts = Counter(Verdict(verdict).name.lower() for verdict in samples["verdict"])
        kept = counts.pop("kept", 0)
        self.context.log(
            Event.UNIT,
            stage=stage.name,
            unit=unit,
            samples=len(samples),
            given=stage.is_given(unit),
            kept=kept,
            rejected=dict(counts),
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
        )
        logger.info("%s unit %d: kept %d of %d, rejected %s", stage.name, unit, kept, len(samples), dict(counts))

    def _look_at_memory(self) -> None:
        """Say what was needed at most so far, and keep no more than is in use."""
        release_unused()
        self.context.log(Event.MEMORY, **self.context.memory.record())

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        return self.context.turn(takes_it=self.parallel.rank == 0)


def _vocabularies(rows: int, of_teacher: int, of_student: int) -> tuple[int, int, int]:
    """(ids that count for both models, ids in the teacher's softmax, ids in the student's).

    `rows`: embedding rows both models have; the others: ids of their tokenizers. Without a surplus of the teacher all
    three are `rows`: padding rows of both are left in, where they were in training. With one, what counts are the
    student's tokens alone: rows that it may have at the surplus's ids mean nothing to it. Its own softmax stays over
    all its rows, as in training and in the engine; the teacher's is over all of its own tokens, no padding row.
    """
    if of_teacher <= of_student:
        return rows, rows, rows
    logger.info(
        "vocabulary: the student's %d tokens; the teacher's other %d are tail", of_student, of_teacher - of_student
    )
    return of_student, of_teacher, rows


def _common_rows(teacher: int, student: int) -> int:
    """Embedding rows both models have. Checkpoints of one tokenizer may differ in padding rows, as Qwen2.5 7B and 1.5B
    do."""
    if teacher != student:
        logger.info("vocabulary: teacher %d rows, student %d; softmax over the common ones", teacher, student)
    return min(teacher, student)
