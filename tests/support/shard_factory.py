"""Shards with every column of their kind, for tests."""

from __future__ import annotations

import numpy as np

from megatron_npd.buffer.shards import Shard
from megatron_npd.schema import COLUMNS, Verdict


def make_shard(kind: str, rows: int = 3) -> Shard:
    """A shard with every column of its kind; row i has i + 1 prompt tokens, i response tokens, 2 kept rows' top-k."""
    totals = {"N": rows, "P": rows * (rows + 1) // 2, "R": rows * (rows - 1) // 2, "A": 1, "K": 2, "N+1": rows + 1}
    generator = np.random.default_rng(0)
    columns = {
        name: generator.integers(0, 50, [totals[letter] for letter in dimensions.split(",")]).astype(dtype)
        for name, (dtype, dimensions) in COLUMNS[kind].items()
    }
    columns["prompt_offsets"] = np.arange(rows + 1).cumsum()
    columns["response_offsets"] = np.array([0, *np.arange(rows).cumsum()])
    if kind == "samples":
        columns["verdict"] %= len(Verdict)
        columns["topk_offsets"] = np.array([0] * rows + [1])
    return Shard(kind, columns, {"stage": "round_0000", "unit": 4})


def equal(a: Shard, b: Shard) -> bool:
    return (a.kind, a.metadata) == (b.kind, b.metadata) and all(
        np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in COLUMNS[a.kind]
    )
