"""The plan of a run: stages, units of work, identities, seeds and the order of training. All pure functions.

A stage is one set of responses by one generator: `heldout` and `warmup` by the teacher, `round_0000`, ... by one
policy version each. A unit is a contiguous slice of a stage's (prompt, sample) pairs: one lease, one shard.
Identity of a sample: (stage, prompt_index, sample_index). Nothing here depends on arrival order, on who did
the work, or on the data-parallel size.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from megatron_npd.config import Config
from megatron_npd.data.prompts import HELDOUT, SPLITS, TRAIN, load_prompt_set
from megatron_npd.run_directory import HELDOUT_STAGE, WARMUP_STAGE, RunDirectory, round_stage
from megatron_npd.schema import TEACHER_VERSION


@dataclass(frozen=True)
class Stage:
    """One generator's set of responses.

    `prompt_index` and `sample_index` are int64 / int32 [n], in unit order: unit u owns the slice
    `[u * samples_per_unit, (u + 1) * samples_per_unit)`.
    """

    name: str
    split: str
    """Prompt set, `train` or `heldout`."""
    version: int
    """Policy version that generates it, or TEACHER_VERSION."""
    prompt_index: np.ndarray
    sample_index: np.ndarray
    samples_per_unit: int

    @property
    def units(self) -> int:
        """Number of units of work."""
        return -(-len(self.prompt_index) // self.samples_per_unit)

    def rows(self, unit: int) -> slice:
        """Rows of the stage that a unit owns."""
        start = unit * self.samples_per_unit
        return slice(start, min(start + self.samples_per_unit, len(self.prompt_index)))

    @property
    def publishes(self) -> int:
        """Policy version the training on it makes."""
        return 1 if self.version == TEACHER_VERSION else self.version + 1


@dataclass(frozen=True)
class Plan:
    """Every stage of a run, and which policy versions it publishes."""

    stages: dict[str, Stage]
    first_round_version: int
    """Version that generates round 0: 1 after a warm-up, else 0."""
    final_version: int
    """The finished student."""

    @property
    def teacher_stages(self) -> list[Stage]:
        """Stages the teacher generates."""
        return [stage for stage in self.stages.values() if stage.version == TEACHER_VERSION]

    @property
    def round_stages(self) -> list[Stage]:
        """Stages the student generates, in order."""
        return [stage for stage in self.stages.values() if stage.version != TEACHER_VERSION]

    @property
    def training_stages(self) -> list[Stage]:
        """Stages the trainer consumes, in order: the warm-up if there is one, then the rounds."""
        return [stage for stage in self.stages.values() if stage.name != HELDOUT_STAGE]


def plan_of(run: RunDirectory, config: Config) -> Plan:
    """The plan of a prepared run.

    Raises:
        OSError, ValueError: its prompt sets cannot be read.
    """
    return make_plan(config, *(len(load_prompt_set(run.prompts(split))) for split in SPLITS))


def make_plan(config: Config, train_prompts: int, heldout_prompts: int) -> Plan:
    """The plan of a run over prompt sets of these sizes."""
    per_unit = config.rollout.samples_per_unit
    stages = [_stage(HELDOUT_STAGE, HELDOUT, TEACHER_VERSION, np.arange(heldout_prompts), 1, per_unit)]
    if config.warmup.samples_per_prompt:
        prompts = _prompts_of_warmup(config, train_prompts)
        stages.append(_stage(WARMUP_STAGE, TRAIN, TEACHER_VERSION, prompts, config.warmup.samples_per_prompt, per_unit))
    first = 1 if config.warmup.samples_per_prompt else 0
    for index in range(config.rounds.count):
        prompts = _prompts_of_round(config, train_prompts, index)
        stages.append(
            _stage(
                round_stage(index),
                TRAIN,
                first + index,
                prompts,
                config.rounds.samples_per_prompt,
                per_unit,
            )
        )
    return Plan({stage.name: stage for stage in stages}, first, first + config.rounds.count)


def epochs_of(config: Config, stage: str) -> int:
    """Passes over the kept samples of a stage."""
    return config.warmup.epochs if stage == WARMUP_STAGE else config.rounds.epochs_per_round


def publishing_step(config: Config, plan: Plan, stage: Stage, steps: int) -> int:
    """After which of its steps (1-based) a stage's version is published."""
    early = stage.version != TEACHER_VERSION and stage.publishes != plan.final_version
    return max(1, math.ceil(config.rounds.publish_at * steps)) if early else steps


def sampling_seed(run_seed: int, stage: str, prompt_index: int, sample_index: int) -> int:
    """Sampling seed of an identity, in [0, 2^31): the same whoever generates the sample, however often."""
    return _derive(run_seed, "sample", stage, prompt_index, sample_index) % 2**31


def training_order(run_seed: int, stage: str, epoch: int, identities: np.ndarray) -> np.ndarray:
    """Order in which an epoch visits samples: a permutation, int64 [n].

    `identities` is int64 [n, 2] (prompt_index, sample_index) of the kept samples, in any order; the sequence of
    identities visited depends on the set alone.
    """
    canonical = np.lexsort((identities[:, 1], identities[:, 0]))
    return canonical[generator(run_seed, "order", stage, epoch).permutation(len(identities))]


def generator(run_seed: int, *purpose: object) -> np.random.Generator:
    """A random generator of its own for each purpose."""
    return np.random.default_rng(_derive(run_seed, *purpose))


def _stage(name: str, split: str, version: int, prompts: np.ndarray, samples_per_prompt: int, per_unit: int) -> Stage:
    prompt_index = np.repeat(prompts.astype(np.int64), samples_per_prompt)
    sample_index = np.tile(np.arange(samples_per_prompt, dtype=np.int32), len(prompts))
    return Stage(name, split, version, prompt_index, sample_index, per_unit)


def _prompts_of_warmup(config: Config, train_prompts: int) -> np.ndarray:
    """All prompts in order, or some of them."""
    size = min(config.warmup.prompts or train_prompts, train_prompts)
    if size == train_prompts:
        return np.arange(train_prompts)
    return generator(config.seed, "prompts", "warmup").permutation(train_prompts)[:size]


def _prompts_of_round(config: Config, train_prompts: int, index: int) -> np.ndarray:
    """Rounds walk through the prompts in shuffled passes; no prompt comes twice in a round."""
    size = min(config.rounds.prompts_per_round or train_prompts, train_prompts)
    rounds_per_pass = max(train_prompts // size, 1)
    shuffle = generator(config.seed, "prompts", index // rounds_per_pass).permutation(train_prompts)
    start = (index % rounds_per_pass) * size
    return shuffle[start : start + size]


def _derive(run_seed: int, *purpose: object) -> int:
    text = "/".join(str(part) for part in (run_seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
