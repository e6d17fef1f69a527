"""A rank's slice of the vocabulary: other ranks' ids change nothing, and no value is asked of the device."""

from __future__ import annotations

import pytest
import torch

from megatron_npd.kernels.vocab_parallel import CHUNK, CHUNK_ON_GPU, VocabShard, chunks

SHARD = VocabShard(first=10, valid=6)
IDS = torch.tensor([[10, 15, 3], [2, 12, 40], [1, 2, 3], [9, 16, 10]])
"""All own but one; one own; none; ids at both edges, and column 0."""


def test_overwriting_touches_own_columns_alone() -> None:
    into, values = torch.arange(24.0).view(4, 6), -torch.arange(1.0, 13.0).view(4, 3)
    expected = into.clone()
    for row, ids in enumerate(IDS.tolist()):
        for place, id in enumerate(ids):
            if 10 <= id < 16:
                expected[row, id - 10] = values[row, place]
    SHARD.overwrite(into, IDS, values)
    assert torch.equal(into, expected)


def test_adding_touches_own_columns_alone() -> None:
    into, values = torch.arange(24.0).view(4, 6), torch.full((4, 1), 100.0)
    expected = into.clone()
    expected[0, 0] += 100.0
    SHARD.add(into, IDS[:, :1], values)
    assert torch.equal(into, expected)


def test_infinite_values_stay_where_they_belong() -> None:
    logits = torch.zeros(4, 6)
    sums = SHARD.logsumexp_without(logits, IDS)
    assert sums.exp().round().tolist() == [4.0, 5.0, 6.0, 5.0]


def test_a_rank_of_padding_alone_owns_nothing() -> None:
    empty = torch.zeros(4, 0)
    VocabShard(10, 0).overwrite(empty, IDS, torch.ones(4, 3))
    VocabShard(10, 0).add(empty, IDS[:, :1], torch.ones(4, 1))
    assert VocabShard(10, 0).logsumexp_without(empty, IDS).tolist() == [-torch.inf] * 4


def test_nothing_is_asked_of_the_device() -> None:
    """Tensors on the meta device have no values: asking for one fails, as it would wait on a GPU."""
    into, ids = torch.zeros(4, 6, device="meta"), IDS.to("meta")
    SHARD.overwrite(into, ids, torch.zeros(4, 3, device="meta"))
    SHARD.add(into, ids[:, :1], torch.zeros(4, 1, device="meta"))
    assert SHARD.read(into, ids).shape == (4, 3)
    assert SHARD.logsumexp_without(into, ids).shape == (4,)


@pytest.mark.parametrize(("device", "size"), [("cpu", CHUNK), ("meta", CHUNK_ON_GPU)])
def test_chunks_suit_the_device(device: str, size: int) -> None:
    rows = [part for part, _ in chunks(torch.zeros(2500, 3, device=device), VocabShard(0, 3))]
    assert rows[0] == slice(0, size) and rows[-1].stop == 2500
