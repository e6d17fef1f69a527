"""The trainer: warm-up, then round after round, publishing on the sparse schedule. Every rank runs `run`."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import torch

from megatron_npd.buffer.plan import Plan, Stage, make_plan
from megatron_npd.buffer.versions import published_versions
from megatron_npd.buffer.waiting import turn, turn_lock
from megatron_npd.config import Config
from megatron_npd.data.packing import collate
from megatron_npd.data.prompts import load_prompt_set
from megatron_npd.errors import UserError
from megatron_npd.hf_config import read_model_dims
from megatron_npd.mcore.attention import choose_backend
from megatron_npd.mcore.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from megatron_npd.mcore.model import build_gpt, named_parameters
from megatron_npd.mcore.optimizer import make_trainable, train_step, unwrap
from megatron_npd.mcore.parallel import barrier, broadcast_object, initialize, shutdown
from megatron_npd.observe.metrics import Metrics
from megatron_npd.run_directory import WARMUP_STAGE, RunDirectory
from megatron_npd.schema import TEACHER_VERSION
from megatron_npd.training.publishing import publish, write_student
from megatron_npd.training.samples import StageSamples, read_stage, wait_for_stage
from megatron_npd.training.schedule import Step, learning_rate, plan_steps, share_of_rank
from megatron_npd.training.step import collect_sums, forward_step
from megatron_npd.weights.load import load_hugging_face

logger = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Train the student from where the run directory stands to the end of the plan."""
    try:
        trainer = Trainer(config)
        trainer.publish(0)
        for stage in trainer.plan.training_stages:
            if stage.name not in trainer.finished:
                trainer.train_stage(stage)
        trainer.finish()
    finally:
        shutdown()


class Trainer:
    """The student, its optimizer, and where in the plan the run stands."""

    def __init__(self, config: Config):
        started = time.monotonic()
        self.config = config
        self.run = RunDirectory(Path(config.run_directory))
        layout = config.training
        torch.set_num_threads(layout.threads)
        self.parallel = initialize(layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, config.seed)
        self.dims = read_model_dims(config.models.student)
        self.plan = self._plan()
        dtype = getattr(torch, config.models.dtype)
        backend = choose_backend(layout.attention_backend, dtype)
        model = build_gpt(self.dims, self.parallel, dtype, backend, layout.sequence_parallel)
        load_hugging_face(named_parameters(model), config.models.student, self.dims, self.parallel)
        self.trainable = make_trainable(model, layout, self.parallel)
        self.step = 0
        self.finished: list[str] = []
        self.newest_version = max(published_versions(self.run), default=0)
        self.drifted: set[str] = set()
        """Stages whose near-policy limit was passed, and that were warned of."""
        self._resume()
        self.metrics = self._open_metrics()
        self.log(
            "start",
            seconds=time.monotonic() - started,
            attention_backend=backend,
            parameters=sum(p.numel() for p in model.parameters()),
        )

    def train_stage(self, stage: Stage) -> None:
        """All steps of a stage, the publication it owes, and a checkpoint."""
        samples = self._wait_and_read(stage)
        steps = self._plan_steps(stage, samples)
        logger.info("%s: %d samples, %d steps", stage.name, len(samples.samples), len(steps))
        publish_at = self._publishing_step(stage, len(steps))
        for number, step in enumerate(steps, start=1):
            drift = self._optimizer_step(stage, samples, step)
            if number == publish_at or self._refresh_is_due(stage, drift):
                self.publish(stage.version + 1 if stage.version != TEACHER_VERSION else 1)
        self.finished.append(stage.name)
        self._checkpoint()

    def publish(self, version: int) -> None:
        """Publish the current weights, unless that version is out already (a restart, or an early refresh)."""
        self.newest_version = max(self.newest_version, version)
        if version in published_versions(self.run):
            barrier()
            return
        barrier()
        with turn(self._turn_lock()):
            started = time.monotonic()
            size = publish(self.run, self.config, version, unwrap(self.trainable), self.dims, self.parallel)
        self.log("publish", version=version, bytes=size, seconds=time.monotonic() - started)
        logger.info("published version %d (%.0f MB)", version, size / 1e6)

    def finish(self) -> None:
        """Leave the finished student as an ordinary Hugging Face checkpoint."""
        if self.parallel.rank == 0:
            write_student(self.run, self.plan.final_version)
            logger.info("the student is in %s", self.run.student)
        barrier()

    def log(self, event: str, step: int | None = None, **values: object) -> None:
        """One metrics record, from the one rank that knows the loss."""
        if self.metrics:
            self.metrics.log(event, step, **values)

    def _optimizer_step(self, stage: Stage, samples: StageSamples, step: Step) -> float | None:
        """One optimizer step; the near-policy KL on every rank (None in the warm-up: another model's samples)."""
        training, parallel = self.config.training, self.parallel
        rate = self._learning_rate(stage, step)
        batches = [
            collate([samples.samples[i] for i in items], training.sequence_length, self.config.annotator.top_k)
            for items in share_of_rank(step.packs, parallel.dp_rank, parallel.dp_size)
        ]
        with turn(self._turn_lock()):
            started = time.monotonic()
            reports, gradient_norm = train_step(
                self.trainable, batches, forward_step(training, self.dims, parallel), training.sequence_length, rate
            )
            seconds = time.monotonic() - started
        self.step += 1
        sums = collect_sums(reports) if parallel.is_last_stage else None
        sums = broadcast_object(sums, source=self._logging_rank())
        if not math.isfinite(sums.loss):
            raise FloatingPointError(f"step {self.step}: the loss is {sums.loss}")
        on_policy = stage.version != TEACHER_VERSION
        drift = sums.drift / sums.tokens if on_policy else None
        positions = len(step.packs) * training.sequence_length
        used = sum(samples.positions(items) for items in step.packs)
        self.log(
            "step",
            self.step,
            stage=stage.name,
            epoch=step.epoch,
            seconds=seconds,
            **{
                "train/loss": sums.loss / sums.tokens,
                "train/ce": sums.ce / sums.tokens,
                "train/kd": sums.kd / sums.tokens,
                "train/grad_norm": gradient_norm,
                "train/lr": rate,
                "train/response_tokens": int(sums.tokens),
                "perf/tokens": positions,
                "perf/seconds": seconds,
                "perf/tokens_per_second": positions / seconds,
                "buffer/packing_efficiency": used / positions,
                "near_policy/kl": drift,
                "near_policy/lag": self.newest_version - stage.version if on_policy else None,
            },
        )
        logger.info(
            "%s step %d: loss %.4f, grad norm %.2f", stage.name, self.step, sums.loss / sums.tokens, gradient_norm
        )
        return drift

    def _learning_rate(self, stage: Stage, step: Step) -> float:
        training, warmup = self.config.training, self.config.warmup
        if stage.name == WARMUP_STAGE:
            return learning_rate(step.progress, warmup.lr, warmup.lr / 10, training.lr_warmup_fraction)
        index = stage.version - self.plan.first_round_version
        progress = (index + step.progress) / self.config.rounds.count
        return learning_rate(progress, training.lr, training.min_lr, training.lr_warmup_fraction)

    def _publishing_step(self, stage: Stage, steps: int) -> int:
        """After which step of a stage (1-based) its version is published."""
        fraction = 1.0 if stage.version == TEACHER_VERSION else self.config.rounds.publish_at
        last_round = stage.version + 1 == self.plan.final_version
        return steps if last_round else max(1, math.ceil(fraction * steps))

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

    def _wait_and_read(self, stage: Stage) -> StageSamples:
        if self.parallel.rank == 0:
            wait_for_stage(self.run, self.config, stage)
        barrier()
        return read_stage(self.run, self.config, stage, self.newest_version)

    def _plan_steps(self, stage: Stage, samples: StageSamples) -> list[Step]:
        warmup = stage.name == WARMUP_STAGE
        return plan_steps(
            self.config.seed,
            stage.name,
            samples.identities,
            samples.lengths,
            epochs=self.config.warmup.epochs if warmup else self.config.rounds.epochs_per_round,
            capacity=self.config.training.sequence_length,
            global_batch_size=self.config.training.global_batch_size,
        )

    def _plan(self) -> Plan:
        sizes = (len(load_prompt_set(self.run.prompts(split))) for split in ("train", "heldout"))
        return make_plan(self.config, *sizes)

    def _resume(self) -> None:
        checkpoint = latest_checkpoint(self.run.checkpoints)
        if checkpoint is None:
            return
        state = load_checkpoint(checkpoint, self.trainable)
        if state["digest"] != self.config.digest:
            raise UserError(f"{checkpoint}: belongs to another configuration; use another run_directory")
        self.step, self.finished = state["step"], state["finished_stages"]
        logger.info("resumed from %s at step %d, done: %s", checkpoint, self.step, ", ".join(self.finished))

    def _checkpoint(self) -> None:
        state = {"step": self.step, "finished_stages": self.finished, "digest": self.config.digest}
        with turn(self._turn_lock()):
            started = time.monotonic()
            save_checkpoint(self.run.checkpoints, self.step, self.trainable, state)
        self.log("checkpoint", seconds=time.monotonic() - started)

    def _logging_rank(self) -> int:
        """Global rank of the logging rank in Megatron's rank order (tp fastest, then dp, then pp)."""
        return (self.parallel.pp_size - 1) * self.parallel.tp_size * self.parallel.dp_size

    def _turn_lock(self) -> Path | None:
        """Rank 0 takes the turn for all ranks: the others cannot compute without it."""
        return turn_lock(self.config, self.run) if self.parallel.rank == 0 else None

    def _open_metrics(self) -> Metrics | None:
        if not self.parallel.is_logging_rank:
            return None
        return Metrics(self.run.metrics("trainer"), "trainer", self.run.tensorboard)
