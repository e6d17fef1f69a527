"""Which units of a stage are done: one listing of a folder, however many units the stage has."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_npd.buffer.plan import Stage
from megatron_npd.run_directory import RunDirectory

COLLECTED = "collected.json"
"""In a stage's folder: its shards were all there, were used, and are removed (see `buffer.retention`)."""
_UNIT = re.compile(r"unit_(\d{6})\.safetensors")


def finished_units(run: RunDirectory, kind: str, stage: Stage) -> set[int]:
    """Units of a stage whose shard, of kind `rollouts` or `samples`, is there or was there and is not needed again."""
    folder = run.stage(kind, stage.name)
    names = set(_listing(folder))
    if COLLECTED in names:
        return set(range(stage.units))
    return {int(found.group(1)) for found in map(_UNIT.fullmatch, names) if found}


def unfinished_units(run: RunDirectory, kind: str, stage: Stage) -> list[int]:
    """The other units, ascending."""
    return sorted(set(range(stage.units)) - finished_units(run, kind, stage))


def is_finished(run: RunDirectory, kind: str, stage: Stage) -> bool:
    """Whether every unit of a stage is done."""
    return not unfinished_units(run, kind, stage)


def stage_bytes(run: RunDirectory, kind: str, stage: str) -> int:
    """Bytes a stage's shards take."""
    folder = run.stage(kind, stage)
    return sum(size for name in _listing(folder) if _UNIT.fullmatch(name) and (size := _size(folder / name)))


def _listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # quarantined or collected since the listing
        return 0
