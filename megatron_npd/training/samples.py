"""From annotated shards to training samples: waits for a stage, verifies it, refuses what must not be trained on.

Rank 0 verifies whole files once (`wait_for_stage`). Every rank then reads the small columns of all shards, a few dozen
bytes a sample (`open_stage`), and of tokens and top-k only what its own micro-batches need (`StageIndex.read`).
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from megatron_npd.buffer.plan import Stage, generator, given_of
from megatron_npd.buffer.shards import ShardFile, read_or_quarantine
from megatron_npd.config import Config
from megatron_npd.data.batch import TrainingSample
from megatron_npd.errors import UserError
from megatron_npd.process.waiting import wait_for
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import GIVEN_VERSION, TEACHER_VERSION, Verdict

logger = logging.getLogger(__name__)

OFFSETS = ("prompt_offsets", "response_offsets", "topk_offsets")
SMALL_COLUMNS = ("prompt_index", "sample_index", "policy_version", "verdict", *OFFSETS)

Wait = Callable[[str, Callable[[], bool | None], float], object]
"""What to wait for, looking whether it is there, and how often to look (seconds); as `process.waiting.wait_for`."""

KEPT = Verdict.KEPT.name.lower()

OPEN_FILES = 64
"""Shards a process holds open at most, of the 1,024 files it commonly may."""


@dataclass(frozen=True)
class _Unit:
    """A unit's shard, and of its kept samples what is small."""

    path: Path
    checksum: str
    identities: np.ndarray  # int64 [kept, 2]
    bounds: np.ndarray  # int64 [kept, 3, 2]: first and last + 1 of prompt, response and top-k rows
    verdicts: Counter[str]  # of all samples
    is_given: bool


class StageIndex:
    """The kept samples of a stage, in unit order: who and how long they are; the rest is read on demand.

    Attributes:
        identities: int64 [n, 2] (prompt_index, sample_index).
        lengths: int64 [n], positions of each sample without alignment.
        verdicts: how many samples of the stage got which verdict, by its lower-case name.
        given: how many of the samples are given responses.
    """

    def __init__(self, units: list[_Unit]):
        self.identities = np.concatenate([unit.identities for unit in units])
        self.verdicts: dict[str, int] = dict(sum((unit.verdicts for unit in units), Counter()))
        self.given = sum(len(unit.identities) for unit in units if unit.is_given)
        self._bounds = np.concatenate([unit.bounds for unit in units])
        self._unit = np.repeat(np.arange(len(units)), [len(unit.identities) for unit in units])
        self._shards = [(unit.path, unit.checksum) for unit in units]
        self._open: OrderedDict[int, ShardFile] = OrderedDict()  # by unit, least recently used first
        sizes = self._bounds[:, :, 1] - self._bounds[:, :, 0]
        self.lengths = sizes[:, 0] + sizes[:, 1] - 1

    def __len__(self) -> int:
        return len(self.identities)

    def positions(self, items: list[int]) -> int:
        """Positions some of the samples take together, without alignment."""
        return int(self.lengths[items].sum())

    def read(self, items: list[int]) -> list[TrainingSample]:
        """Samples by their place in the index, in the order asked for. Only their rows are read.

        Raises:
            ValueError: a shard vanished or changed since the stage was opened; the file is named.
        """
        samples: dict[int, TrainingSample] = {}
        for unit, members in groupby(sorted(set(items)), key=lambda item: int(self._unit[item])):
            shard = self._shard(unit)
            samples |= {item: _training_sample(shard, self._bounds[item].tolist()) for item in members}
        return [samples[item] for item in items]

    def close(self) -> None:
        """Close all files; a later `read` opens them again."""
        for shard in self._open.values():
            shard.close()
        self._open.clear()

    def _shard(self, unit: int) -> ShardFile:
        """The open shard of a unit, certainly the one that was indexed."""
        shard = self._open.pop(unit, None)
        if shard is not None and not shard.is_current():
            shard.close()
            shard = None
        path, checksum = self._shards[unit]
        shard = shard or ShardFile(path, "samples")
        if shard.checksum != checksum:
            raise ValueError(
                f"{path}: changed since the stage was opened: checksum {shard.checksum[:12]}, was {checksum[:12]}"
            )
        self._open[unit] = shard
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return shard


def wait_for_stage(run: RunDirectory, config: Config, stage: Stage, wait: Wait = wait_for) -> None:
    """Return when every unit of a stage is annotated and verifies; a corrupt shard is set aside and waited for again.

    `wait`: must look on one rank only, for looking may move files.
    """
    for unit in range(stage.units):
        path = run.unit("samples", stage.name, unit)

        def look(path=path) -> bool | None:
            return True if path.exists() and read_or_quarantine(path, "samples") is not None else None

        wait(f"samples of {stage.name}, unit {unit + 1} of {stage.units}", look, config.launch.poll_seconds)


def open_stage(run: RunDirectory, config: Config, stage: Stage, newest_version: int) -> StageIndex:
    """Index of the kept samples of a complete, verified stage.

    Raises:
        UserError: no sample was kept, or of a round less than `selection.least_kept_share`; the reasons are named.
        ValueError: a shard is missing, does not hold the samples of its unit, is of another stage's version, staler
            than `rounds.max_policy_lag`, or annotated for another `training.kd_temperature`; the file is named.
    """
    units = [_open_unit(run, config, stage, unit, newest_version) for unit in range(stage.units)]
    index = StageIndex(_mixed(config, stage, units))
    own = sum((unit.verdicts for unit in units if not unit.is_given), Counter())
    if not len(index):
        beside = " beside which given ones could be trained on" if stage.own and stage.given else ""
        raise _too_little(run, stage, f"no sample was kept{beside}", own or index.verdicts)
    least, kept = config.selection.least_kept_share, own[KEPT]
    if stage.version != TEACHER_VERSION and kept < least * stage.own:
        rule = f"must be selection.least_kept_share = {least:g} of them at least"
        raise _too_little(run, stage, f"{kept} of {stage.own} samples were kept, {rule}", own)
    return index


def _too_little(run: RunDirectory, stage: Stage, what: str, verdicts: Mapping[str, int]) -> UserError:
    reasons = ", ".join(f"{count} {name}" for name, count in sorted(verdicts.items()))
    return UserError(f"{run.root}: {stage.name}: {what} ({reasons}); see npd inspect --rejected")


def _mixed(config: Config, stage: Stage, units: list[_Unit]) -> list[_Unit]:
    """Of the given responses of a round as many as its share wants beside the others that were kept."""
    if stage.version == TEACHER_VERSION or not stage.given:
        return units
    own, given = units[: stage.own_units], units[stage.own_units :]
    kept, there = (sum(len(unit.identities) for unit in part) for part in (own, given))
    wanted = given_of(config.rounds.given_share, kept)
    if wanted > there:
        logger.warning(
            "%s: %d given responses are there beside %d others: a share of %.3f, not rounds.given_share = %g",
            stage.name, there, kept, there / max(there + kept, 1), config.rounds.given_share,
        )  # fmt: skip
        return units
    chosen = np.zeros(there, dtype=bool)
    chosen[generator(config.seed, "given", stage.name).permutation(there)[:wanted]] = True
    parts = np.split(chosen, np.cumsum([len(unit.identities) for unit in given])[:-1])
    return own + [
        replace(unit, identities=unit.identities[take], bounds=unit.bounds[take])
        for unit, take in zip(given, parts, strict=True)
    ]


def _open_unit(run: RunDirectory, config: Config, stage: Stage, unit: int, newest_version: int) -> _Unit:
    path = run.unit("samples", stage.name, unit)
    with contextlib.closing(ShardFile(path, "samples")) as shard:
        columns = {name: shard[name] for name in SMALL_COLUMNS}
    _check_unit(path, columns, stage, unit, newest_version, config.rounds.max_policy_lag)
    _check_temperature(path, shard.metadata.get("kd_temperature"), config.training.kd_temperature)
    kept = np.flatnonzero(columns["verdict"] == Verdict.KEPT)
    return _Unit(
        path,
        shard.checksum,
        identities=np.stack([columns["prompt_index"][kept], columns["sample_index"][kept].astype(np.int64)], axis=1),
        bounds=np.stack([np.stack([columns[name][kept], columns[name][kept + 1]], axis=1) for name in OFFSETS], axis=1),
        verdicts=Counter(Verdict(verdict).name.lower() for verdict in columns["verdict"]),
        is_given=stage.is_given(unit),
    )


def _training_sample(shard: ShardFile, bounds: list[list[int]]) -> TrainingSample:
    prompt, response, topk = bounds
    return TrainingSample(
        prompt_ids=shard.rows("prompt_ids", *prompt),
        response_ids=shard.rows("response_ids", *response),
        behaviour_logprobs=shard.rows("behaviour_logprobs", *response),
        topk_ids=shard.rows("topk_ids", *topk),
        topk_logprobs=shard.rows("topk_logprobs", *topk),
        tail_mass=shard.rows("tail_mass", *topk),
    )


def _check_unit(
    path: Path, columns: Mapping[str, np.ndarray], stage: Stage, unit: int, newest_version: int, max_policy_lag: int
) -> None:
    """A shard must hold exactly its unit's identities, sampled by the stage's version, not too long ago."""
    rows = stage.rows(unit)
    if not np.array_equal(columns["prompt_index"], stage.prompt_index[rows]) or not np.array_equal(
        columns["sample_index"], stage.sample_index[rows]
    ):
        raise ValueError(f"{path}: samples are not those of the plan")
    versions, expected = set(columns["policy_version"].tolist()), stage.version_of(unit)
    if versions - {expected}:
        raise ValueError(f"{path}: policy versions {versions}, expected {expected}")
    if expected not in (TEACHER_VERSION, GIVEN_VERSION) and newest_version - stage.version > max_policy_lag:
        raise ValueError(
            f"{path}: sampled by version {stage.version}, newest is {newest_version}: "
            f"more than rounds.max_policy_lag = {max_policy_lag} behind"
        )
    kept = columns["verdict"] == Verdict.KEPT
    lengths, annotated = np.diff(columns["response_offsets"]), np.diff(columns["topk_offsets"])
    if not np.array_equal(annotated, np.where(kept, lengths, 0)):
        raise ValueError(f"{path}: annotation rows do not match the kept responses")


def _check_temperature(path: Path, recorded: object, wanted: float) -> None:
    """The teacher's logprobs are of one temperature; the loss would take them for those of another."""
    try:
        matches = float(str(recorded)) == wanted
    except ValueError:
        matches = False
    if not matches:
        raise ValueError(
            f"{path}: kd_temperature = {recorded!r}: must equal training.kd_temperature = {wanted}, "
            "at which the annotator scores the teacher; annotate the stage again"
        )
