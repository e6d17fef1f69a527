"""The share of a packed batch that one context-parallel rank computes: Megatron's load-balanced zig-zag. Pure numpy.

Under a causal mask late positions cost more than early ones. So every sequence is cut into 2 x size equal chunks, and
rank r holds chunks r and 2 x size - 1 - r of each, in this order, sequence after sequence: what Transformer Engine's
attention and Megatron's rotary embedding expect of packed (THD) batches.

    size 2, one sequence of 8 positions:  rank 0 holds 0 1 6 7,  rank 1 holds 2 3 4 5
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_npd.data.batch import PackedBatch, ranges


def context_parallel_positions(cu_seqlens: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Positions of the whole pack that a rank holds, int64 [T / size], in the rank's order, which is ascending.

    Args:
        cu_seqlens: int [sequences + 1], first 0, last T; every sequence's length is a multiple of 2 x `size`
            (`lay_out` with that alignment), except for size 1, which holds everything.
    """
    assert 0 <= rank < size, f"rank {rank} of {size}"
    bounds = np.asarray(cu_seqlens, dtype=np.int64)
    if size == 1:
        return np.arange(bounds[-1])
    lengths = np.diff(bounds)
    assert not np.any(lengths % (2 * size)), f"sequences must divide into {2 * size} chunks, lengths are {lengths}"
    chunks = lengths // (2 * size)
    starts = bounds[:-1, None] + chunks[:, None] * np.array([rank, 2 * size - 1 - rank])
    return ranges(starts.reshape(-1), np.repeat(chunks, 2))


def context_parallel_share(batch: PackedBatch, rank: int, size: int) -> PackedBatch:
    """A rank's share of a whole pack: T / size tokens and the rows among them; cu_seqlens stay those of the pack.

    `rows` index the share's tokens. A value computed for row i of the share belongs to row `row_index[i]` of the pack.
    Size 1 returns the batch itself.
    """
    if size == 1:
        return batch
    held = context_parallel_positions(batch.cu_seqlens, rank, size)
    local = np.full(len(batch.tokens), -1, dtype=np.int64)
    local[held] = np.arange(len(held))
    # Positions are held in ascending order, so rows stay ascending.
    kept = np.flatnonzero(local[batch.rows] >= 0)
    return replace(
        batch,
        tokens=batch.tokens[held],
        rows=local[batch.rows[kept]],
        targets=batch.targets[kept],
        behaviour_logprobs=batch.behaviour_logprobs[kept],
        topk_ids=batch.topk_ids[kept],
        topk_logprobs=batch.topk_logprobs[kept],
        tail_mass=batch.tail_mass[kept],
        row_index=batch.row_index[kept],
    )
