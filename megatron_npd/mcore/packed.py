"""Describing a packed (THD) batch to Megatron and to attention, also when its sequences are split over ranks.

With context parallelism every sequence is cut in 2 cp equal chunks and rank r holds chunks r and 2 cp - 1 - r: each
rank then attends to the same number of keys (Transformer Engine's zig-zag). Every boundary in `cu_seqlens` must
therefore be a multiple of 2 cp (`Parallel.sequence_alignment`).

The bounds of the sequences stay in host memory: what is derived from them is computed there, when it is first asked
for, and goes to the device without anybody waiting for the device.

Legend: T tokens of the whole packed batch, S sequences.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_npd.hardware.transfer import to_device


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed batch, and what our own attention and rotary embedding need of it.

    `cu_seqlens_q` and `_kv` are for Transformer Engine, `local` and `positions` for what is our own.
    """

    bounds: np.ndarray | None = None
    """int32 [S + 1] of the WHOLE batch, starting at 0, in host memory."""
    cp_rank: int = 0
    cp_size: int = 1
    device: str = "cpu"

    @functools.cached_property
    def local(self) -> LocalSequences:
        """This rank's part."""
        return _local_sequences(self.bounds, self.cp_rank, self.cp_size, self.device)

    @functools.cached_property
    def positions(self) -> torch.Tensor:
        """int64 [T / cp], the place in its sequence of each of this rank's tokens."""
        pieces = [np.arange(*piece) - start for start, *piece in _pieces(self.bounds, self.cp_rank, self.cp_size)]
        return to_device(self.device, np.concatenate(pieces).astype(np.int64))[0]


@dataclass(frozen=True)
class LocalSequences:
    """What this rank's queries attend to: pieces of queries, each with the keys up to its own last token.

    A piece's queries are the LAST tokens of its keys, so causal attention is aligned at the bottom right.
    """

    cu_seqlens_q: torch.Tensor
    """int32 [pieces + 1], bounds of the pieces among this rank's tokens."""
    cu_seqlens_k: torch.Tensor
    """int32 [pieces + 1], bounds of their keys after `key_index`."""
    max_seqlen_q: int
    max_seqlen_k: int
    key_index: torch.Tensor | None = None
    """int64, keys of all pieces one after another, as indices into the ranks' keys gathered in rank order; None
    without context parallelism: keys are this rank's own tokens."""


def packed_sequences(
    bounds: np.ndarray, cp_rank: int = 0, cp_size: int = 1, device: str = "cpu", fused_rotary: bool = False
) -> PackedSequences:
    """Describe a packed batch.

    Args:
        bounds: int32 [S + 1] of the WHOLE batch, starting at 0, in host memory.
        fused_rotary: Megatron turns queries and keys sequence by sequence, in one kernel of Transformer Engine. Without
            it their angles come from `positions`, and Megatron must not look at sequences.
    """
    longest = int(np.diff(bounds).max())
    cu_seqlens = to_device(device, bounds)[0] if fused_rotary else None
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=bounds,
        cp_rank=cp_rank,
        cp_size=cp_size,
        device=device,
    )


def _pieces(bounds: np.ndarray, cp_rank: int, cp_size: int) -> Iterator[tuple[int, int, int]]:
    """(start of its sequence, start, end) in the whole batch of each piece of this rank, in its order."""
    for start, end in itertools.pairwise(bounds.tolist()):
        if cp_size == 1:
            yield start, start, end
            continue
        chunk = _chunk_length(start, end, cp_size)
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            yield start, start + number * chunk, start + (number + 1) * chunk


def _chunk_length(start: int, end: int, cp_size: int) -> int:
    chunk, remainder = divmod(end - start, 2 * cp_size)
    assert not remainder, f"sequence of {end - start} positions, must be a multiple of {2 * cp_size}"
    return chunk


def _local_sequences(bounds: np.ndarray, cp_rank: int, cp_size: int, device: str) -> LocalSequences:
    """Each piece's queries attend to its sequence up to the piece's last token."""
    if cp_size == 1:
        (cu_seqlens,), longest = to_device(device, bounds), int(np.diff(bounds).max())
        return LocalSequences(cu_seqlens, cu_seqlens, longest, longest)
    pieces = list(_pieces(bounds, cp_rank, cp_size))
    queries, keys = [end - begin for _, begin, end in pieces], [end - start for start, _, end in pieces]
    places = _places_after_gathering(bounds, cp_size)
    bounds_q, bounds_k, key_index = to_device(
        device,
        np.cumsum([0, *queries], dtype=np.int32),
        np.cumsum([0, *keys], dtype=np.int32),
        np.concatenate([places[start:end] for start, _, end in pieces]),
    )
    return LocalSequences(bounds_q, bounds_k, max(queries), max(keys), key_index)


def _places_after_gathering(bounds: np.ndarray, cp_size: int) -> np.ndarray:
    """int64 [T]: where each token of the batch lies when the ranks' tokens are gathered in rank order."""
    places = np.empty(bounds[-1], dtype=np.int64)
    order = [np.arange(begin, end) for rank in range(cp_size) for _, begin, end in _pieces(bounds, rank, cp_size)]
    places[np.concatenate(order)] = np.arange(bounds[-1])
    return places
