"""Packing samples into fixed-length token sequences, and collating packs into arrays. Pure numpy.

A sample of P prompt and R response tokens takes P + R - 1 positions: its last token predicts nothing. Position
P - 1 + t predicts response token t. Packs are filled best-fit decreasing; the rest of a pack is one padding sequence
of its own, which attention keeps apart and no loss sees.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np


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
        """Positions the sample takes in a pack."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


@dataclass(frozen=True)
class PackedBatch:
    """One packed sequence of T positions, of which N predict a response token (rows ascending)."""

    tokens: np.ndarray  # int64 [T]
    cu_seqlens: np.ndarray  # int32 [sequences + 1], first 0, last T
    rows: np.ndarray  # int64 [N], positions that predict a response token
    targets: np.ndarray  # int64 [N]
    behaviour_logprobs: np.ndarray  # float32 [N]
    topk_ids: np.ndarray  # int64 [N, K]
    topk_logprobs: np.ndarray  # float32 [N, K]
    tail_mass: np.ndarray  # float32 [N]


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Partition items into packs of at most `capacity`: best fit, longest first, ties by index.

    Deterministic in `lengths`. O(n log n).

    Raises:
        ValueError: an item is longer than the capacity.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"item {int(lengths.argmax())} has {int(lengths.max())} tokens, capacity is {capacity}")
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # room left -> packs with that room
    rooms: list[int] = []  # keys of open_packs, ascending
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            number, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[place]
            number = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room]
                rooms.pop(place)
        packs[number].append(item)
        left = room - length
        if left not in open_packs:
            open_packs[left] = []
            bisect.insort(rooms, left)
        open_packs[left].append(number)
    return packs


def lay_out(
    pairs: list[tuple[np.ndarray, np.ndarray]], capacity: int | None = None, padding_id: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay (prefix, response) pairs one after another, each without its last token.

    Args:
        pairs: token ids; every prefix holds at least one token, so that the first response token is predicted.
        capacity: positions of the result, filled up with one padding sequence; None: just what is needed.

    Returns:
        tokens int64 [T], cu_seqlens int32 [sequences + 1], and the rows int64 [N] that predict a response token, in
        order of the pairs.
    """
    lengths = [len(prefix) + len(response) - 1 for prefix, response in pairs]
    used = sum(lengths)
    total = used if capacity is None else capacity
    tokens = np.full(total, padding_id, dtype=np.int64)
    bounds, rows = [0], []
    for (prefix, response), length in zip(pairs, lengths, strict=True):
        start, end = bounds[-1], bounds[-1] + length
        tokens[start:end] = np.concatenate([prefix, response])[:-1]
        rows.append(np.arange(start + len(prefix) - 1, end, dtype=np.int64))
        bounds.append(end)
    if used < total:
        bounds.append(total)
    flat_rows = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    return tokens, np.array(bounds, dtype=np.int32), flat_rows


def collate(samples: list[TrainingSample], capacity: int, top_k: int) -> PackedBatch:
    """One pack of `capacity` positions. An empty list gives padding alone."""
    pairs = [(sample.prompt_ids, sample.response_ids) for sample in samples]
    tokens, cu_seqlens, rows = lay_out(pairs, capacity)

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
    )
