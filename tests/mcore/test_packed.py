"""Describing a packed batch: positions and pieces as a loop over tokens gives them, and nothing read from a device."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megatron_npd.mcore import packed
from megatron_npd.mcore.packed import packed_sequences

BOUNDS = np.array([0, 8, 12, 32], dtype=np.int32)


def own_tokens(cp_rank: int, cp_size: int) -> list[tuple[int, int]]:
    """(sequence, position in it) of a rank's tokens, by the rule: chunks r and 2 cp - 1 - r of every sequence."""
    tokens = []
    for sequence, (start, end) in enumerate(itertools.pairwise(BOUNDS)):
        length = int(end - start)
        chunk = length // (2 * cp_size) if cp_size > 1 else length
        numbers = (cp_rank, 2 * cp_size - 1 - cp_rank) if cp_size > 1 else (0,)
        tokens += [(sequence, n * chunk + i) for n in numbers for i in range(chunk)]
    return tokens


@pytest.mark.parametrize(("cp_rank", "cp_size"), [(0, 1), (0, 2), (1, 2)])
def test_positions_are_places_in_the_sequence(cp_rank: int, cp_size: int) -> None:
    expected = [position for _, position in own_tokens(cp_rank, cp_size)]
    assert packed_sequences(BOUNDS, cp_rank, cp_size).positions.tolist() == expected


@pytest.mark.parametrize(("cp_rank", "cp_size"), [(0, 2), (1, 2)])
def test_each_piece_sees_its_sequence_up_to_its_own_end(cp_rank: int, cp_size: int) -> None:
    gathered = [token for rank in range(cp_size) for token in own_tokens(rank, cp_size)]
    mine, local = own_tokens(cp_rank, cp_size), packed_sequences(BOUNDS, cp_rank, cp_size).local
    queries, keys = local.cu_seqlens_q.tolist(), local.cu_seqlens_k.tolist()
    assert (local.max_seqlen_q, local.max_seqlen_k) == (max(np.diff(queries)), max(np.diff(keys)))
    for piece in range(len(queries) - 1):
        sequence, last = mine[queries[piece + 1] - 1]
        seen = [gathered[i] for i in local.key_index[keys[piece] : keys[piece + 1]].tolist()]
        assert seen == [(sequence, position) for position in range(last + 1)]


@pytest.mark.parametrize("fused_rotary", [False, True])
@pytest.mark.parametrize("cp_size", [1, 2])
def test_nothing_is_read_from_the_device(
    cp_size: int, fused_rotary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Tensors on the meta device have no values: reading one fails."""

    def to_meta(device: str, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(array).to("meta") for array in arrays)

    monkeypatch.setattr(packed, "to_device", to_meta)
    described = packed_sequences(BOUNDS, 0, cp_size, "cuda", fused_rotary)
    assert described.local.cu_seqlens_q.is_meta and described.positions.shape == (32 // cp_size,)
    assert (described.cu_seqlens_q is None) is not fused_rotary


def test_a_sequence_that_does_not_divide_is_refused() -> None:
    with pytest.raises(AssertionError, match="sequence of 6 positions, must be a multiple of 4"):
        _ = packed_sequences(np.array([0, 6], dtype=np.int32), 0, 2).local
