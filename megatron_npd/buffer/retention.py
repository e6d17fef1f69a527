"""Removing what was trained on, and not running too far ahead of the trainer: what keeps a long run's disk bounded.

A stage is collected when the trainer has left it behind in a checkpoint that is current, so that no restart can want
it again. What it held stays in a small `collected.json`, which also tells every role that the stage is done.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from megatron_npd.buffer.listing import COLLECTED, stage_bytes
from megatron_npd.buffer.plan import Plan, Stage
from megatron_npd.buffer.shards import CorruptShardError, ShardFile
from megatron_npd.files import read_json, write_json
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import GIVEN_VERSION, Verdict

logger = logging.getLogger(__name__)

KINDS = ("rollouts", "samples")
TRAINED = "trained.json"
"""In a stage's samples folder: the trainer will not ask for it again."""


def retire_stages(run: RunDirectory, plan: Plan, trained: Iterable[str], keep: int) -> None:
    """Mark trained stages as such, and remove the shards of all but the newest `keep` of them (0: of none).

    Call on one process. `trained`: names of stages that a current checkpoint has behind it.
    """
    done = [stage for stage in plan.training_stages if stage.name in set(trained)]
    for stage in done:
        marker = run.stage("samples", stage.name) / TRAINED
        if not marker.is_file():
            write_json(marker, {"stage": stage.name})
    for stage in done[: max(len(done) - keep, 0)] if keep else []:
        freed = sum(_collect(run, kind, stage) for kind in KINDS)
        if freed:
            logger.info("%s was trained on: removed %.0f MB of shards", stage.name, freed / 1e6)


def is_trained(run: RunDirectory, stage: str) -> bool:
    """Whether the trainer has left a stage behind for good."""
    return (run.stage("samples", stage) / TRAINED).is_file()


def collected(run: RunDirectory, kind: str, stage: str) -> dict[str, Any] | None:
    """What a collected stage held: units, samples, bytes, and verdicts {name: count}; None if it is not collected.

    `samples` and `verdicts` are of responses that a model sampled, `given` and `given_verdicts` of given ones.
    """
    path = run.stage(kind, stage) / COLLECTED
    return read_json(path) if path.is_file() else None


def has_room(run: RunDirectory, plan: Plan, stage: Stage, limit: int) -> bool:
    """Whether responses for `stage` may be generated now: the buffer is below its limit, or waiting would never end.

    `limit`: bytes of all shards, rollouts and samples; 0: no limit. The trainer waits for whole stages, so the first
    stage that is not trained yet always has room: a limit delays those after it and never stops the run.
    """
    order = [other.name for other in plan.training_stages]
    earlier = order[: order.index(stage.name)] if stage.name in order else []
    if not limit or all(is_trained(run, name) for name in earlier):
        return True
    return sum(stage_bytes(run, kind, name) for kind in KINDS for name in plan.stages) < limit


def _collect(run: RunDirectory, kind: str, stage: Stage) -> int:
    """Note what the shards held, then remove them; returns bytes. Goes on where one that was killed stopped."""
    folder = run.stage(kind, stage.name)
    size = stage_bytes(run, kind, stage.name)
    if not (folder / COLLECTED).is_file():
        write_json(folder / COLLECTED, _figures(run, kind, stage) | {"bytes": size})
    for unit in range(stage.units):
        with contextlib.suppress(FileNotFoundError):
            run.unit(kind, stage.name, unit).unlink()
    return size


def _figures(run: RunDirectory, kind: str, stage: Stage) -> dict[str, Any]:
    names = [verdict.name.lower() for verdict in Verdict] if kind == "samples" else []
    counts = {False: 0, True: 0}
    verdicts: dict[bool, Counter[str]] = {given: Counter(dict.fromkeys(names, 0)) for given in counts}
    for unit in range(stage.units):
        try:
            with contextlib.closing(ShardFile(run.unit(kind, stage.name, unit), kind)) as shard:
                given = bool((shard["policy_version"] == GIVEN_VERSION).any())  # a unit is given as a whole, or not
                counts[given] += len(shard["prompt_index"])
                if kind == "samples":
                    verdicts[given].update(Verdict(verdict).name.lower() for verdict in shard["verdict"])
        except CorruptShardError as error:
            logger.warning("left out of the figures: %s", error)
    return {
        "stage": stage.name,
        "units": stage.units,
        "samples": counts[False],
        "given": counts[True],
        "verdicts": dict(verdicts[False]),
        "given_verdicts": dict(verdicts[True]),
    }
