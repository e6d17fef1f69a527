"""The trainer: warm-up, then round after round, publishing on the sparse schedule. Every rank runs `run`."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

from megatron_npd.buffer.plan import Stage, epochs_of, publishing_step
from megatron_npd.buffer.retention import retire_stages
from megatron_npd.buffer.role_context import RoleContext
from megatron_npd.config import Config
from megatron_npd.data.ahead import Ahead
from megatron_npd.data.batch import PackedBatch, collate
from megatron_npd.data.context_parallel import context_parallel_share
from megatron_npd.distributed.collectives import barrier, broadcast_object, greatest
from megatron_npd.distributed.together import leave_if_asked, wait_together
from megatron_npd.errors import UserError
from megatron_npd.mcore.checkpoint import Checkpointer, latest_checkpoint, load_checkpoint, read_run_state
from megatron_npd.mcore.model_parallel import shutdown
from megatron_npd.mcore.optimizer import micro_batch_multiple, train_step
from megatron_npd.models.cost import cost_model
from megatron_npd.process import stopping
from megatron_npd.process.activity import doing, waiting
from megatron_npd.process.memory import release_unused
from megatron_npd.roles import TRAINER
from megatron_npd.run_directory import WARMUP_STAGE
from megatron_npd.schema import TEACHER_VERSION, Event
from megatron_npd.training.position import Position
from megatron_npd.training.publishing import make_publisher, publish, version_to_hand_over, write_student
from megatron_npd.training.samples import StageIndex, open_stage, wait_for_stage
from megatron_npd.training.schedule import PackCosts, Step, deal, imbalance, learning_rate_of, plan_steps
from megatron_npd.training.step import collect_sums, forward_step
from megatron_npd.training.step_metrics import StepReport
from megatron_npd.training.student import make_student
from megatron_npd.versions.manifest import published_versions
from megatron_npd.weights.publish import Published

logger = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Train the student from where the run directory stands to the end of the plan.

    Raises:
        Stopped: it was asked to stop, and everything up to the last step is in a checkpoint.
    """
    try:
        trainer = Trainer(config)
        with stopping.deferred(), doing("getting ready for the next step"):
            trainer.train()
    finally:
        shutdown()


class Prepared(NamedTuple):
    """A step's packs, dealt out over the data-parallel ranks, and this rank's micro-batches."""

    costs: PackCosts
    shares: list[list[list[int]]]
    batches: list[PackedBatch]


class Trainer:
    """The student, its optimizer, and where in the plan the run stands."""

    def __init__(self, config: Config):
        self.context = context = RoleContext(config, TRAINER)
        self.config, self.run, self.plan = config, context.run, context.plan
        self.student = make_student(config)
        self.parallel = self.student.parallel
        self.costs = cost_model(self.student.dims)
        self.newest_version = broadcast_object(max(published_versions(self.run), default=-1))
        """Newest version that is published or being published; -1 before the first."""
        self.drifted: set[str] = set()
        """Stages whose near-policy limit was passed, and that were warned of."""
        self._saved_step = 0
        """Step of the newest checkpoint, current or under way; starting over is as good as one of step 0."""
        self._saved_stages: list[str] = []
        """Stages that are finished by that checkpoint."""
        self.position = self._resume()
        training = config.training
        self.checkpointer = Checkpointer(
            self.run.checkpoints, self.student.trainable, training.keep_checkpoints, training.asynchronous_checkpoints
        )
        self.publisher = make_publisher(self.run, config, self.student, self._note_published)
        if self.parallel.is_logging_rank:
            context.open_metrics(self.run.metrics(TRAINER), self.run.tensorboard)
        context.log(
            Event.START,
            import_seconds=context.import_seconds,
            seconds=time.monotonic() - context.started,
            attention_backend=self.student.options.attention_backend,
            parameters=sum(p.numel() for model in self.student.trainable.models for p in model.parameters()),
        )

    def train(self) -> None:
        """Everything that is left of the plan. Can be stopped between two steps and while it waits for samples."""
        try:
            self.publish(0)
            for stage in self.plan.training_stages:
                if stage.name not in self.position.finished:
                    self.train_stage(stage)
            self.finish()
        except stopping.Stopped as request:
            self._save_and_leave(request)
            raise

    def train_stage(self, stage: Stage) -> None:
        """All steps of a stage that are left, the publication it owes, and checkpoints."""
        samples = self._wait_and_open(stage)
        steps = self._plan_steps(stage, samples)
        done = self.position.enter(stage.name)
        given = f", {samples.given} of them given" if samples.given else ""
        logger.info(
            "%s: %d samples%s, %d of %d steps left", stage.name, len(samples), given, len(steps) - done, len(steps)
        )
        self.context.log(Event.STAGE, stage=stage.name, samples=len(samples), given=samples.given, steps=len(steps))
        publish_at = publishing_step(self.config, self.plan, stage, len(steps))
        prepare: Callable[[Step], Prepared] = functools.partial(self._prepare, samples)
        if self.parallel.device != "cpu":  # where the CPU computes, a thread beside it would only take turns with it
            prepare = Ahead(steps[done:], prepare)
        for number, step in enumerate(steps[done:], start=done + 1):
            with doing(f"training on {stage.name}, step {number} of {len(steps)}"):
                drift = self._optimizer_step(stage, samples, step, prepare)
            if number == publish_at or self._refresh_is_due(stage, drift):
                self.publish(stage.publishes)
            self.publisher.poll()
            if number < len(steps):
                self._checkpoint_if_due()
                leave_if_asked(self.parallel)
        samples.close()
        self.position.leave()
        if self._ends_with_checkpoint(stage):
            self._checkpoint()

    def publish(self, version: int) -> None:
        """Begin to publish the weights as they are, unless that version exists (a restart, or an early refresh)."""
        if version <= self.newest_version:
            return
        self.newest_version = version
        self.publisher.wait()
        barrier()
        release_unused()  # what steps need is free now; a publication wants memory of its own
        with doing(f"publishing version {version}"), self._turn():
            publish(self.publisher, self.run, self.config, version, self.student)
        release_unused()

    def _note_published(self, published: Published) -> None:
        self.context.log(Event.PUBLISH, **asdict(published))
        logger.info(
            "published version %d (%.0f MB) in %.1f s; training stood still for %.1f s",
            published.version,
            published.bytes / 1e6,
            published.seconds,
            published.stall_seconds,
        )

    def finish(self) -> None:
        """Leave the finished student as an ordinary Hugging Face checkpoint."""
        self._settle()
        choose = functools.partial(version_to_hand_over, self.run, self.plan, self.config)
        by = self.config.export.by
        version = wait_together(self.parallel, f"{by} of every version, of which the best is handed over", choose)
        if self.parallel.rank == 0:
            write_student(self.run, version, by)
            logger.info("the student, version %d, is in %s", version, self.run.student)
        barrier()

    def _prepare(self, samples: StageIndex, step: Step) -> Prepared:
        """Deal out a step's packs, and read and collate this rank's."""
        training, parallel = self.config.training, self.parallel
        costs = PackCosts(self.costs, samples.lengths, training.sequence_length, parallel.sequence_alignment)
        attention = [costs.attention(items) for items in step.packs]
        shares = deal(step.packs, attention, parallel.dp_size, micro_batch_multiple(parallel))
        return Prepared(costs, shares, [self._micro_batch(samples, items) for items in shares[parallel.dp_rank]])

    def _optimizer_step(
        self, stage: Stage, samples: StageIndex, step: Step, prepare: Callable[[Step], Prepared]
    ) -> float | None:
        """One optimizer step; the near-policy KL on every rank (None in the warm-up: another model's samples)."""
        training, parallel, student = self.config.training, self.parallel, self.student
        rate = learning_rate_of(self.config, self.plan, stage, step)
        started = time.monotonic()
        costs, shares, batches = prepare(step)
        seconds = time.monotonic() - started  # of making the batches, or of waiting for the thread that does
        with self._turn():
            started = time.monotonic()
            kd_lambda = self.config.warmup.kd_lambda if stage.name == WARMUP_STAGE else training.kd_lambda
            loss_step = forward_step(training, student.dims, parallel, kd_lambda)
            reports, norm = train_step(student.trainable, batches, loss_step, training.sequence_length, rate)
            sums = collect_sums(reports, parallel) if parallel.is_last_stage else None
            sums = broadcast_object(sums, source=parallel.logging_rank)  # a GPU's update of the weights is done by now
            seconds += time.monotonic() - started
        self.position.step_done()
        if not math.isfinite(sums.loss):
            raise FloatingPointError(f"step {self.position.step}: the loss is {sums.loss}")
        report = StepReport(
            sums,
            norm,
            rate,
            seconds,
            positions=sum(map(len, shares)) * training.sequence_length,
            used_positions=sum(samples.positions(items) for items in step.packs),
            imbalance=imbalance([costs.of_rank(share) for share in shares]),
            flops=sum(costs.useful(items) for items in step.packs) + self.costs.head * sums.tokens,
            policy_lag=None if stage.version == TEACHER_VERSION else self._newest_during(stage) - stage.version,
        )
        self.context.log(
            Event.STEP, self.position.step, stage=stage.name, epoch=step.epoch, seconds=seconds, **report.metrics()
        )
        loss = sums.loss / sums.tokens
        logger.info("%s step %d: loss %.4f, grad norm %.2f", stage.name, self.position.step, loss, norm)
        return report.drift

    def _micro_batch(self, samples: StageIndex, items: list[int]) -> PackedBatch:
        """This rank's share of one pack: only the samples in it are read."""
        capacity, top_k = self.config.training.sequence_length, self.config.annotator.top_k
        batch = collate(samples.read(items), capacity, top_k, self.parallel.sequence_alignment)
        return context_parallel_share(batch, self.parallel.cp_rank, self.parallel.cp_size)

    def _refresh_is_due(self, stage: Stage, drift: float | None) -> bool:
        """Past the near-policy limit: warn, or ask for the next version now, as configured."""
        limit = self.config.near_policy.kl_limit
        if drift is None or drift <= limit:
            return False
        if stage.name not in self.drifted:
            self.drifted.add(stage.name)
            logger.warning("%s: near-policy KL %.3f is past near_policy.kl_limit = %.3f", stage.name, drift, limit)
        early = self.config.near_policy.action == "refresh"
        return early and stage.version + 1 < self.plan.final_version

    def _wait_and_open(self, stage: Stage) -> StageIndex:
        # The stage may be hours away, or be sampled by the version being published: finish publishing and saving first.
        self._settle()
        wait_for_stage(self.run, self.config, stage, functools.partial(wait_together, self.parallel))
        return open_stage(self.run, self.config, stage, self._version)

    def _plan_steps(self, stage: Stage, samples: StageIndex) -> list[Step]:
        return plan_steps(
            self.config.seed,
            stage.name,
            samples.identities,
            samples.lengths,
            epochs=epochs_of(self.config, stage.name),
            capacity=self.config.training.sequence_length,
            global_batch_size=self.config.training.global_batch_size,
            alignment=self.parallel.sequence_alignment,
            cost=self.costs,
        )

    def _resume(self) -> Position:
        checkpoint = latest_checkpoint(self.run.checkpoints)
        if checkpoint is None:
            return Position()
        state = read_run_state(checkpoint)
        if state["digest"] != self.config.digest:
            raise UserError(f"{checkpoint}: belongs to another configuration; use another run_directory")
        load_checkpoint(checkpoint, self.student.trainable)
        position = Position.from_state(state["progress"])
        self._saved_step, self._saved_stages = position.step, list(position.finished)
        logger.info("resumed from %s: %s", checkpoint, position)
        return position

    @property
    def _version(self) -> int:
        """Where the weights stood when the stages that are finished were: published versions may be ahead of that, when
        a restart trains on samples again."""
        return max((self.plan.stages[name].publishes for name in self.position.finished), default=0)

    def _newest_during(self, stage: Stage) -> int:
        """The newest version while a stage is trained on."""
        return min(self.newest_version, stage.publishes)

    def _ends_with_checkpoint(self, stage: Stage) -> bool:
        rounds = stage.version - self.plan.first_round_version + 1  # up to this one
        every = self.config.training.checkpoint_rounds
        return stage.name == WARMUP_STAGE or rounds == self.config.rounds.count or rounds % every == 0

    def _checkpoint_if_due(self) -> None:
        interval = self.config.training.checkpoint_interval
        if interval and self.position.step % interval == 0:
            self._checkpoint()
        else:
            self.checkpointer.poll()

    def _checkpoint(self) -> None:
        # A checkpoint counts the versions before it as published: resumed from, it never publishes them again.
        self.publisher.wait()
        release_unused()
        state = {"digest": self.config.digest, "progress": self.position.to_state()}
        with doing(f"saving a checkpoint of step {self.position.step}"), self._turn():
            started = time.monotonic()
            self.checkpointer.save(self.position.step, state)
        self._saved_step, self._saved_stages = self.position.step, list(self.position.finished)
        self.context.log(Event.CHECKPOINT, seconds=time.monotonic() - started)

    def _save_and_leave(self, request: stopping.Stopped) -> None:
        """Leave nothing half done: the last step is in the current checkpoint, the last version is visible."""
        step = self.position.step
        logger.info("asked to stop by signal %d: saving everything up to step %d", request.number, step)
        self._settle()
        if step != self._saved_step:
            self._checkpoint()
            self._settle()
        logger.info("everything up to step %d is saved", step)

    def _settle(self) -> None:
        """Return when everything that is being published or saved is visible and current; no restart can then want a
        stage that is behind it."""
        with waiting("its publication and checkpoint to be written"):
            self.publisher.wait()
            self.checkpointer.wait()
        if self.parallel.rank == 0:
            retire_stages(self.run, self.plan, self._saved_stages, self.config.buffer.keep_rounds)
        release_unused()
        record = self.context.memory.record()
        largest = greatest(record.values(), self.parallel)
        self.context.log(Event.MEMORY, **dict(zip(record, largest, strict=True)))

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        """Rank 0 takes the turn for all ranks: the others cannot compute without it. A trainer that is leaving does not
        wait for its turn."""
        return self.context.turn(takes_it=self.parallel.rank == 0 and not stopping.requested())
