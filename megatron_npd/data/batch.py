"""Laying samples out in one packed sequence, and collating packs into arrays. Pure numpy.

A sample of P prompt and R response tokens takes P + R - 1 positions: its last token predicts nothing. Position
P - 1 + t predicts response token t. With context parallelism every sequence must divide into 2 x size equal chunks
(`data.context_parallel`), so a sample takes `aligned` positions: padding tokens at its own end, which under causal
attention change nothing before them, and which no loss sees. What samples leave of a pack is padding sequences of its
own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

IntOrArray = TypeVar("IntOrArray", int, np.ndarray)

PADDING_SEQUENCE = 512
"""Positions of a padding sequence, about. As a single sequence the padding of an empty pack would cost as much
attention as the longest sample there can be, and make its rank the one all others wait for."""


@dataclass(frozen=True)
class TrainingSample:
    """One kept response with the teacher's annotation. P prompt, R response tokens, K top-k."""

    prompt_ids: np.ndarray  # int32 [P]
    response_ids: np.ndarray  # int32 [R]
    behaviour_logprobs: np.ndarray  # float32 [R]
    topk_ids: np.ndarray  # int32 [R, K]
    topk_logprobs: np.ndarray  # float32 [R, K]
    tail_mass: np.ndarray  # float32 [R]

    @property
    def length(self) -> int:
        """Positions of the sample, without alignment."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


@dataclass(frozen=True)
class PackedBatch:
    """A packed sequence, or the share of it that one context-parallel rank holds.

    T positions held, of which N predict a response token (`rows` ascending); S sequences in the whole pack.
    """

    tokens: np.ndarray  # int64 [T]
    cu_seqlens: np.ndarray  # int32 [S + 1] of the WHOLE pack, first 0, last its number of positions
    rows: np.ndarray  # int64 [N], those of the T held that predict a response token
    targets: np.ndarray  # int64 [N]
    behaviour_logprobs: np.ndarray  # float32 [N]
    topk_ids: np.ndarray  # int64 [N, K]
    topk_logprobs: np.ndarray  # float32 [N, K]
    tail_mass: np.ndarray  # float32 [N]
    row_index: np.ndarray  # int64 [N], which of the whole pack's rows these are


def aligned(length: IntOrArray, alignment: int) -> IntOrArray:
    """Positions a sample of `length` takes: the next multiple of `alignment`. Works on arrays, too."""
    return -(-length // alignment) * alignment


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + size - 1 for every pair, one after another: int64 [sum of sizes]."""
    ends = np.cumsum(sizes, dtype=np.int64)
    return np.arange(int(sizes.sum()), dtype=np.int64) + np.repeat(starts - (ends - sizes), sizes)


def lay_out(
    pairs: list[tuple[np.ndarray, np.ndarray]], capacity: int | None = None, padding_id: int = 0, alignment: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay (prefix, response) pairs one after another, each without its last token, each from a multiple of `alignment`.

    Args:
        pairs: token ids; every prefix holds at least one token, so that the first response token is predicted.
        capacity: positions of the result, a multiple of `alignment`, filled up with padding sequences; None: just
            what is needed.

    Returns:
        tokens int64 [T], cu_seqlens int32 [sequences + 1] (multiples of `alignment`), and the rows int64 [N] that
        predict a response token, in order of the pairs.
    """
    assert capacity is None or capacity % alignment == 0, f"capacity {capacity} is no multiple of {alignment}"
    lengths = [len(prefix) + len(response) - 1 for prefix, response in pairs]
    used = sum(aligned(length, alignment) for length in lengths)
    total = used if capacity is None else capacity
    assert used <= total, f"{used} positions do not fit into {total}"
    tokens = np.full(total, padding_id, dtype=np.int64)
    bounds, rows = [0], [np.zeros(0, dtype=np.int64)]
    for (prefix, response), length in zip(pairs, lengths, strict=True):
        start = bounds[-1]
        tokens[start : start + length] = np.concatenate([prefix, response])[:-1]
        rows.append(np.arange(start + len(prefix) - 1, start + length, dtype=np.int64))
        bounds.append(start + aligned(length, alignment))
    if used < total:
        bounds += [
            *range(used + aligned(PADDING_SEQUENCE, alignment), total, aligned(PADDING_SEQUENCE, alignment)),
            total,
        ]
    return tokens, np.array(bounds, dtype=np.int32), np.concatenate(rows)


def collate(samples: list[TrainingSample], capacity: int, top_k: int, alignment: int = 1) -> PackedBatch:
    """One whole pack of `capacity` positions, a multiple of `alignment`. An empty list gives padding alone."""
    pairs = [(sample.prompt_ids, sample.response_ids) for sample in samples]
    tokens, cu_seqlens, rows = lay_out(pairs, capacity, alignment=alignment)

    def joined(name: str, dtype: str, empty_shape: tuple[int, ...] = (0,)) -> np.ndarray:
        parts = [getattr(sample, name) for sample in samples] or [np.zeros(empty_shape)]
        return np.concatenate(parts).astype(dtype)

    return PackedBatch(
        tokens=tokens,
        cu_seqlens=cu_seqlens,
        rows=rows,
        targets=joined("response_ids", "int64"),
        behaviour_logprobs=joined("behaviour_logprobs", "float32"),
        topk_ids=joined("topk_ids", "int64", (0, top_k)),
        topk_logprobs=joined("topk_logprobs", "float32", (0, top_k)),
        tail_mass=joined("tail_mass", "float32"),
        row_index=np.arange(len(rows), dtype=np.int64),
    )
