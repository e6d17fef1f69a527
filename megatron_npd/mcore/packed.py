"""Describing a packed (THD) batch to Megatron and to attention, also when its sequences are split over ranks.

With context parallelism every sequence is cut in 2 cp equal chunks and rank r holds chunks r and 2 cp - 1 - r: each
rank then attends to the same number of keys (Transformer Engine's zig-zag). Every boundary in `cu_seqlens` must
therefore be a multiple of 2 cp (`Parallel.sequence_alignment`).

Legend: T tokens of the whole packed batch, S sequences.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed batch, and this rank's part of it for our own attention backends."""

    local: LocalSequences | None = None


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


def packed_sequences(cu_seqlens: torch.Tensor, cp_rank: int = 0, cp_size: int = 1) -> PackedSequences:
    """Describe a packed batch; `cu_seqlens` is int32 [S + 1] of the WHOLE batch, starting at 0."""
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    whole = LocalSequences(cu_seqlens, cu_seqlens, longest, longest)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        local=whole if cp_size == 1 else _zigzag_pieces(cu_seqlens, cp_rank, cp_size),
    )


def _zigzag_pieces(cu_seqlens: torch.Tensor, cp_rank: int, cp_size: int) -> LocalSequences:
    """Two pieces a sequence: chunk r attends to chunks 0..r, chunk 2 cp - 1 - r to chunks 0..2 cp - 1 - r."""
    key_parts, query_lengths, key_lengths = [], [], []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        chunk, remainder = divmod(end - start, 2 * cp_size)
        assert not remainder, f"sequence of {end - start} positions, must be a multiple of {2 * cp_size}"
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            query_lengths.append(chunk)
            key_lengths.append(chunk * (number + 1))
            key_parts += [_place_of_chunk(start, chunk, n, cu_seqlens[-1], cp_size) for n in range(number + 1)]
    device = cu_seqlens.device
    bounds_q, bounds_k = (
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (query_lengths, key_lengths)
    )
    return LocalSequences(
        bounds_q, bounds_k, max(query_lengths), max(key_lengths), torch.cat(key_parts).to(device, torch.int64)
    )


def _place_of_chunk(start: int, chunk: int, number: int, total: torch.Tensor, cp_size: int) -> torch.Tensor:
    """Where a sequence's chunk lies among the ranks' tokens gathered in rank order.

    Rank r holds T / cp tokens; of a sequence that starts at `start` they lie at start / cp, first chunk r, then chunk
    2 cp - 1 - r.
    """
    first_half = number < cp_size
    rank = number if first_half else 2 * cp_size - 1 - number
    begin = rank * (int(total) // cp_size) + start // cp_size + (0 if first_half else chunk)
    return torch.arange(begin, begin + chunk)
