"""From annotated shards to training samples: waits for a stage, verifies it, refuses what must not be trained on."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

import numpy as np

from megatron_npd.buffer.plan import Stage
from megatron_npd.buffer.shards import Shard, read_or_quarantine, read_shard
from megatron_npd.buffer.waiting import wait_for
from megatron_npd.config import Config
from megatron_npd.data.packing import TrainingSample
from megatron_npd.errors import UserError
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import TEACHER_VERSION, Verdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageSamples:
    """The kept samples of a stage, in unit order. `identities` is int64 [n, 2] (prompt_index, sample_index)."""

    samples: list[TrainingSample]
    identities: np.ndarray
    verdicts: dict[str, int]

    @property
    def lengths(self) -> np.ndarray:
        """Positions each sample takes in a pack, int64 [n]."""
        return np.array([sample.length for sample in self.samples], dtype=np.int64)

    def positions(self, items: list[int]) -> int:
        """Positions some of the samples take together."""
        return sum(self.samples[item].length for item in items)


def wait_for_stage(run: RunDirectory, config: Config, stage: Stage) -> None:
    """Return when every unit of a stage is annotated and verifies; a corrupt shard is set aside and waited for again.

    Call on one rank: it may move files.
    """
    for unit in range(stage.units):
        path = run.unit("samples", stage.name, unit)

        def look(path=path) -> bool | None:
            return True if path.exists() and read_or_quarantine(path, "samples") is not None else None

        wait_for(f"samples of {stage.name}, unit {unit + 1} of {stage.units}", look, config.launch.poll_seconds)


def read_stage(run: RunDirectory, config: Config, stage: Stage, newest_version: int) -> StageSamples:
    """Kept samples of a complete stage.

    Raises:
        UserError: no sample was kept; the reasons are named.
        ValueError: a sample twice, of another stage's version, or staler than `rounds.max_policy_lag`.
    """
    samples: list[TrainingSample] = []
    identities: list[tuple[int, int]] = []
    verdicts: Counter[str] = Counter()
    for unit in range(stage.units):
        shard = read_shard(run.unit("samples", stage.name, unit), "samples")
        _check_unit(shard, stage, unit, newest_version, config.rounds.max_policy_lag)
        verdicts.update(Verdict(v).name.lower() for v in shard["verdict"])
        for row in np.flatnonzero(shard["verdict"] == Verdict.KEPT):
            samples.append(_training_sample(shard, int(row)))
            identities.append((int(shard["prompt_index"][row]), int(shard["sample_index"][row])))
    if not samples:
        reasons = ", ".join(f"{count} {name}" for name, count in sorted(verdicts.items()))
        raise UserError(f"{run.root}: {stage.name}: no sample was kept ({reasons}); see npd inspect --rejected")
    return StageSamples(samples, np.array(identities, dtype=np.int64), dict(verdicts))


def _training_sample(shard: Shard, row: int) -> TrainingSample:
    return TrainingSample(
        prompt_ids=shard.prompt(row),
        response_ids=shard.response(row),
        behaviour_logprobs=shard.ragged("behaviour_logprobs", row, "response_offsets"),
        topk_ids=shard.ragged("topk_ids", row, "topk_offsets"),
        topk_logprobs=shard.ragged("topk_logprobs", row, "topk_offsets"),
        tail_mass=shard.ragged("tail_mass", row, "topk_offsets"),
    )


def _check_unit(shard: Shard, stage: Stage, unit: int, newest_version: int, max_policy_lag: int) -> None:
    """A shard must hold exactly its unit's identities, sampled by the stage's version, not too long ago."""
    rows, name = stage.rows(unit), f"{stage.name} unit {unit}"
    if not np.array_equal(shard["prompt_index"], stage.prompt_index[rows]) or not np.array_equal(
        shard["sample_index"], stage.sample_index[rows]
    ):
        raise ValueError(f"{name}: samples are not those of the plan")
    if np.any(shard["policy_version"] != stage.version):
        raise ValueError(f"{name}: policy versions {set(shard['policy_version'].tolist())}, expected {stage.version}")
    if stage.version != TEACHER_VERSION and newest_version - stage.version > max_policy_lag:
        raise ValueError(
            f"{name}: sampled by version {stage.version}, newest is {newest_version}: "
            f"more than rounds.max_policy_lag = {max_policy_lag} behind"
        )
    kept = shard["verdict"] == Verdict.KEPT
    lengths, annotated = np.diff(shard["response_offsets"]), np.diff(shard["topk_offsets"])
    if not np.array_equal(annotated, np.where(kept, lengths, 0)):
        raise ValueError(f"{name}: annotation rows do not match the kept responses")
