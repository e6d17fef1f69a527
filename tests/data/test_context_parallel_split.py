"""The zig-zag split: the shares of all ranks are the pack, in the layout Megatron expects."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_sample import make_sample, positions_of

from megatron_npd.data.batch import PackedBatch, collate
from megatron_npd.data.context_parallel import context_parallel_positions, context_parallel_share

OF_ROWS = ("targets", "behaviour_logprobs", "topk_ids", "topk_logprobs", "tail_mass")

packs = st.tuples(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=6),
    st.sampled_from([1, 2, 3, 4]),  # context-parallel size
    st.integers(0, 100),  # more padding
)


def make_pack(sizes: list[tuple[int, int]], size: int, padding: int) -> PackedBatch:
    generator = np.random.default_rng(0)
    samples = [make_sample(generator, *lengths) for lengths in sizes]
    alignment = 2 * size
    capacity = sum(-(-sample.length // alignment) for sample in samples) + padding
    return collate(samples, max(capacity, 1) * alignment, 3, alignment)


def test_the_zig_zag_of_one_sequence() -> None:
    bounds = np.array([0, 8])
    assert context_parallel_positions(bounds, 0, 2).tolist() == [0, 1, 6, 7]
    assert context_parallel_positions(bounds, 1, 2).tolist() == [2, 3, 4, 5]


@given(packs)
def test_shares_partition_the_pack(pack: tuple) -> None:
    batch, size = make_pack(*pack), pack[1]
    held = [context_parallel_positions(batch.cu_seqlens, rank, size) for rank in range(size)]
    shares = [context_parallel_share(batch, rank, size) for rank in range(size)]
    assert all(positions.dtype == np.int64 for positions in held)
    assert sorted(np.concatenate(held).tolist()) == list(range(len(batch.tokens)))
    assert {len(share.tokens) for share in shares} == {len(batch.tokens) // size}
    assert sorted(np.concatenate([share.row_index for share in shares]).tolist()) == list(range(len(batch.rows)))
    for share, positions in zip(shares, held, strict=True):
        np.testing.assert_array_equal(share.tokens, batch.tokens[positions])
        np.testing.assert_array_equal(share.cu_seqlens, batch.cu_seqlens)
        assert np.all(np.diff(share.rows) > 0)
        # A row is the same position of the pack, seen from the share and from the whole.
        np.testing.assert_array_equal(positions[share.rows], batch.rows[share.row_index])
        for name in OF_ROWS:
            np.testing.assert_array_equal(getattr(share, name), getattr(batch, name)[share.row_index])
            assert getattr(share, name).dtype == getattr(batch, name).dtype


@given(packs)
def test_results_of_all_shares_scatter_back(pack: tuple) -> None:
    batch, size = make_pack(*pack), pack[1]
    restored = np.zeros_like(batch.targets)
    for rank in range(size):
        share = context_parallel_share(batch, rank, size)
        restored[share.row_index] = share.targets
    np.testing.assert_array_equal(restored, batch.targets)


@given(packs)
def test_every_rank_has_as_much_attention_to_compute(pack: tuple) -> None:
    """What the zig-zag is for: keys seen by all queries of a rank."""
    batch, size = make_pack(*pack), pack[1]
    held = [context_parallel_positions(batch.cu_seqlens, rank, size) for rank in range(size)]
    work = [(positions_of(batch)[mine] + 1).sum() for mine in held]
    assert len(set(work)) == 1


def test_size_one_returns_the_batch_itself() -> None:
    batch = collate([make_sample(np.random.default_rng(0), 4, 4)], 9, 3)  # lengths need not be even
    assert context_parallel_share(batch, 0, 1) is batch
    assert context_parallel_positions(batch.cu_seqlens, 0, 1).tolist() == list(range(9))


def test_sequences_that_do_not_divide_are_refused() -> None:
    with pytest.raises(AssertionError, match="must divide into 4 chunks"):
        context_parallel_positions(np.array([0, 8, 14]), 0, 2)


@pytest.mark.heavy
@pytest.mark.parametrize("size", [1, 2, 4])
def test_positions_are_those_of_megatron(size: int) -> None:
    """Megatron rotates the local tokens of a packed sequence by the frequencies this function picks."""
    torch = pytest.importorskip("torch")
    rope = pytest.importorskip("megatron.core.models.common.embeddings.rope_utils")
    batch = make_pack([(5, 20), (1, 1), (17, 30)], size, 3)
    of_sequence, of_pack = torch.arange(64), torch.arange(len(batch.tokens))
    for rank in range(size):
        positions, held = [], []
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            local = torch.empty((end - start) // size)
            positions.append(rope._get_thd_freqs_on_this_cp_rank(rank, size, local, of_sequence))
            held.append(rope._get_thd_freqs_on_this_cp_rank(rank, size, local, of_pack, start))
        mine = context_parallel_positions(batch.cu_seqlens, rank, size)
        np.testing.assert_array_equal(positions_of(batch)[mine], torch.cat(positions).numpy())
        np.testing.assert_array_equal(mine, torch.cat(held).numpy())
