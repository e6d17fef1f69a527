"""The plan of a run: stages, units of work, identities, seeds and the order of training. All pure functions.

A stage is one set of responses by one generator: `heldout` and `warmup` by the teacher, `round_0000`, ... by one
policy version each. Responses that the user's data gives may take the generator's place, or come after its own. A unit
is a contiguous slice of a stage's (prompt, sample) pairs: one lease, one shard, generated or given as a whole.
Identity of a sample: (stage, prompt_index, sample_index). Nothing here depends on arrival order, on who did
the work, or on the data-parallel size.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_npd.config import Config
from megatron_npd.config.versions import chosen_versions
from megatron_npd.data.prompts import HELDOUT, SPLITS, TRAIN, load_prompt_set
from megatron_npd.run_directory import HELDOUT_STAGE, WARMUP_STAGE, RunDirectory, round_stage
from megatron_npd.schema import GIVEN_VERSION, TEACHER_VERSION


@dataclass(frozen=True)
class Stage:
    """One generator's set of responses, and after them given ones.

    `prompt_index` and `sample_index` are int64 / int32 [n], in unit order.
    """

    name: str
    split: str
    """Prompt set, `train` or `heldout`."""
    version: int
    """Policy version that generates it, or TEACHER_VERSION."""
    prompt_index: np.ndarray
    sample_index: np.ndarray
    samples_per_unit: int
    given: int = 0
    """Of the rows, so many at the end are given responses."""

    @property
    def units(self) -> int:
        """Number of units of work."""
        return self.own_units + -(-self.given // self.samples_per_unit)

    @property
    def own(self) -> int:
        """Rows that the stage's version generates."""
        return len(self.prompt_index) - self.given

    @property
    def own_units(self) -> int:
        """Units of these; the units after them are given."""
        return -(-self.own // self.samples_per_unit)

    def is_given(self, unit: int) -> bool:
        """Whether a unit's responses are given, not generated."""
        return unit >= self.own_units

    def version_of(self, unit: int) -> int:
        """Policy version that generates a unit, TEACHER_VERSION, or GIVEN_VERSION."""
        return GIVEN_VERSION if self.is_given(unit) else self.version

    def rows(self, unit: int) -> slice:
        """Rows of the stage that a unit owns."""
        first, end = (self.own, len(self.prompt_index)) if self.is_given(unit) else (0, self.own)
        start = first + (unit - self.own_units if self.is_given(unit) else unit) * self.samples_per_unit
        return slice(start, min(start + self.samples_per_unit, end))

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
    evaluated: frozenset[int]
    """Versions whose held-out figures are wanted."""
    asked: dict[str, frozenset[int]] = field(default_factory=dict)
    """Name of each evaluation -> the versions that answer it."""

    @property
    def teacher_stages(self) -> list[Stage]:
        """Stages the teacher generates."""
        return [stage for stage in self.stages.values() if stage.version == TEACHER_VERSION]

    @property
    def round_stages(self) -> list[Stage]:
        """Stages the student generates, in order."""
        return [stage for stage in self.stages.values() if stage.version != TEACHER_VERSION]

    @property
    def round_versions(self) -> list[int]:
        """Versions that generate rounds, in order."""
        return [stage.version for stage in self.round_stages]

    @property
    def training_stages(self) -> list[Stage]:
        """Stages the trainer consumes, in order: the warm-up if there is one, then the rounds."""
        return [stage for stage in self.stages.values() if stage.name != HELDOUT_STAGE]


def plan_of(run: RunDirectory, config: Config) -> Plan:
    """The plan of a prepared run.

    Raises:
        OSError, ValueError: its prompt sets cannot be read.
    """
    prompts = {split: load_prompt_set(run.prompts(split)) for split in SPLITS}
    return make_plan(config, len(prompts[TRAIN]), len(prompts[HELDOUT]), prompts[TRAIN].answered)


def make_plan(config: Config, train_prompts: int, heldout_prompts: int, answered: np.ndarray | None = None) -> Plan:
    """The plan of a run over prompt sets of these sizes.

    `answered`: training prompts that have a given response, int64, ascending; None: all.
    """
    per_unit = config.rollout.samples_per_unit
    answered = np.arange(train_prompts) if answered is None else answered
    heldout = np.arange(heldout_prompts)
    if config.heldout.source == "data":
        stages = [_given_after(_stage(HELDOUT_STAGE, HELDOUT, TEACHER_VERSION, heldout[:0], 1, per_unit), heldout, 0)]
    else:
        stages = [_stage(HELDOUT_STAGE, HELDOUT, TEACHER_VERSION, heldout, 1, per_unit)]
    if config.warmup.source == "data":
        prompts = _prompts_of_warmup(config, answered)
        stages.append(_given_after(_stage(WARMUP_STAGE, TRAIN, TEACHER_VERSION, prompts[:0], 1, per_unit), prompts, 0))
    elif config.warmup.samples:
        prompts = _prompts_of_warmup(config, np.arange(train_prompts))
        stages.append(_stage(WARMUP_STAGE, TRAIN, TEACHER_VERSION, prompts, config.warmup.samples, per_unit))
    first, last = config.first_of_rounds, config.last_version
    for index in range(config.rounds.count):
        prompts = _prompts_of_round(config, train_prompts, index)
        samples = config.rounds.samples_per_prompt
        stage = _stage(round_stage(index), TRAIN, first + index, prompts, samples, per_unit)
        stages.append(_given_after(stage, _given_of_round(config, answered, stage.own, index), samples))
    evaluated = chosen_versions(config.heldout.versions, first, last)
    asked = {one.name: chosen_versions(one.versions, first, last) for one in config.evaluation}
    return Plan({stage.name: stage for stage in stages}, first, last, evaluated, asked)


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


def lot(run_seed: int, stage: str, prompt_index: int, sample_index: int) -> int:
    """A number in [0, 2^64) drawn for an identity, for rules of selection that leave something to chance."""
    return _derive(run_seed, "lot", stage, prompt_index, sample_index)


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


def _given_after(stage: Stage, prompts: np.ndarray, sample_index: int) -> Stage:
    """A stage with the given responses to these prompts after its own; `sample_index` is one that no own one has."""
    indices = np.full(len(prompts), sample_index, np.int32)
    return replace(
        stage,
        prompt_index=np.concatenate([stage.prompt_index, prompts.astype(np.int64)]),
        sample_index=np.concatenate([stage.sample_index, indices]),
        given=len(prompts),
    )


def _prompts_of_warmup(config: Config, prompts: np.ndarray) -> np.ndarray:
    """All of these prompts in order, or some of them."""
    size = min(config.warmup.prompts or len(prompts), len(prompts))
    if size == len(prompts):
        return prompts
    return prompts[generator(config.seed, "prompts", "warmup").permutation(len(prompts))[:size]]


def given_of(share: float, own: int) -> int:
    """Given responses beside which `own` others are 1 - `share` of all."""
    return round(own * share / (1.0 - share))


def _given_of_round(config: Config, answered: np.ndarray, own: int, index: int) -> np.ndarray:
    """Prompts whose given responses a round takes: rounds walk through them in shuffled passes. None comes twice in a
    round, so there may be fewer than the share asks for."""
    size = min(given_of(config.rounds.given_share, own), len(answered))
    if not size:
        return answered[:0]
    rounds_per_pass = max(len(answered) // size, 1)
    shuffle = generator(config.seed, "given", index // rounds_per_pass).permutation(len(answered))
    start = (index % rounds_per_pass) * size
    return answered[shuffle[start : start + size]]


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
