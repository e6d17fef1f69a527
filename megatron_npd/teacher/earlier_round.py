"""What a rule of selection may know of the round before: it is finished, so nothing about it changes any more."""

from __future__ import annotations

import contextlib

import numpy as np

from megatron_npd.buffer.plan import Stage
from megatron_npd.buffer.shards import ShardFile
from megatron_npd.run_directory import RunDirectory


def deltas_of(run: RunDirectory, stage: Stage) -> np.ndarray:
    """Δ-IFD of every sample that a round's version generated, float64 [N], NaN where there is none.

    Raises:
        CorruptShardError: one of its shards is not there or not readable.
    """
    parts = []
    for unit in range(stage.own_units):
        with contextlib.closing(ShardFile(run.unit("samples", stage.name, unit), "samples")) as shard:
            parts.append(shard["delta_ifd"])
    return np.concatenate(parts)
