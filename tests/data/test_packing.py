"""Packing and collating: nothing lost, nothing misaligned, packs full and of equal cost."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_sample import make_sample, positions_of

from megatron_npd.data.batch import PADDING_SEQUENCE, aligned, collate, lay_out
from megatron_npd.data.packing import pack, pack_balanced
from megatron_npd.models.cost import CostModel, cost_model
from megatron_npd.models.hf_config import ModelDims

CAPACITY = 32768
PANGU_1B = ModelDims(
    family="llama",
    vocab_size=153376,
    hidden_size=1536,
    intermediate_size=6144,
    num_layers=26,
    num_heads=12,
    num_kv_heads=6,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=4e6,
    max_positions=32768,
    tied_embeddings=True,
)


# --- best fit ---


@given(st.lists(st.integers(1, 100), max_size=200))
def test_pack_is_a_partition_within_capacity(lengths: list[int]) -> None:
    packs = pack(np.array(lengths, dtype=np.int64), 100)
    assert sorted(item for items in packs for item in items) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in items) <= 100 for items in packs)


def test_pack_fills_realistic_lengths() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6.0, 0.8, 5000).astype(int), 16, 8192)
    packs = pack(lengths, 32768)
    assert lengths.sum() / (len(packs) * 32768) > 0.98


@pytest.mark.parametrize("packer", [pack, lambda lengths, capacity: pack_balanced(lengths, capacity, lengths)])
def test_packing_refuses_what_cannot_fit(packer) -> None:
    with pytest.raises(ValueError, match="item 1 has 11 tokens, capacity is 10"):
        packer(np.array([3, 11]), 10)


# --- balanced ---


def length_mix(name: str, count: int, seed: int) -> np.ndarray:
    """Positions of `count` samples, int64."""
    generator = np.random.default_rng(seed)
    lengths = {
        "uniform to 8k": generator.integers(16, 8193, count),
        "uniform to 16k": generator.integers(16, 16385, count),
        "uniform to 32k": generator.integers(16, CAPACITY + 1, count),
        "chat": generator.lognormal(np.log(400), 1.0, count),
        "maths": generator.lognormal(np.log(2000), 0.9, count),
        "short and long": np.where(
            generator.random(count) < 0.7, generator.normal(300, 80, count), generator.normal(9000, 2500, count)
        ),
    }[name]
    return np.clip(lengths, 16, CAPACITY).astype(np.int64)


def least_packs(lengths: np.ndarray, capacity: int) -> int:
    """A lower bound on the number of packs (L2 of Martello and Toth 1990, Knapsack Problems, section 8.3.2)."""
    bounds = []
    for small in range(0, capacity // 2 + 1, 128):
        alone = lengths > capacity - small  # with none of those from `small` up
        large = (lengths > capacity // 2) & ~alone
        rest = lengths[(lengths <= capacity // 2) & (lengths >= small)].sum()
        bounds.append(alone.sum() + large.sum() + max(0, -(-(rest - (capacity - lengths[large]).sum()) // capacity)))
    return int(max(bounds))


@given(
    st.lists(st.tuples(st.integers(0, 100), st.floats(0, 1e15)), max_size=120),
    st.integers(100, 300),
)
def test_balanced_packs_are_a_partition_into_no_more_packs(items: list[tuple[int, float]], capacity: int) -> None:
    lengths = np.array([length for length, _ in items], dtype=np.int64)
    costs = np.array([cost for _, cost in items])
    packs = pack_balanced(lengths, capacity, costs)
    assert sorted(item for members in packs for item in members) == list(range(len(items)))
    assert all(members and lengths[members].sum() <= capacity for members in packs)
    assert -(-int(lengths.sum()) // capacity) <= len(packs) <= len(pack(lengths, capacity))
    assert packs == pack_balanced(lengths, capacity, costs)


@pytest.mark.parametrize("name", ["chat", "maths", "short and long", "uniform to 8k", "uniform to 16k"])
@pytest.mark.parametrize("seed", [0, 1])
def test_balanced_packs_are_full_and_of_more_equal_cost_than_best_fit(name: str, seed: int) -> None:
    lengths = length_mix(name, 6000, seed)
    costs = cost_model(PANGU_1B).of(lengths)
    balanced, best_fit = (
        np.array([costs[members].sum() for members in packs])
        for packs in (pack_balanced(lengths, CAPACITY, costs), pack(lengths, CAPACITY))
    )
    assert len(balanced) <= len(best_fit)
    assert lengths.sum() / (len(balanced) * CAPACITY) >= 0.99
    # In "maths" the longest sample alone is as dear as best fit's dearest pack: there the maximum cannot fall.
    assert balanced.max() / balanced.mean() < best_fit.max() / best_fit.mean() or balanced.max() == costs.max()
    assert balanced.std() < 0.8 * best_fit.std()


@pytest.mark.parametrize("seed", [0, 1])
def test_where_many_samples_exceed_half_a_pack_packs_are_as_few_as_can_be(seed: int) -> None:
    """Each needs a pack of its own and what completes it, so fill and balance are given by the samples."""
    lengths = length_mix("uniform to 32k", 6000, seed)
    packs = pack_balanced(lengths, CAPACITY, cost_model(PANGU_1B).of(lengths))
    assert len(packs) <= 1.005 * least_packs(lengths, CAPACITY)


def test_packing_is_balanced_where_samples_are_short() -> None:
    lengths = length_mix("uniform to 8k", 6000, 2)
    costs = cost_model(PANGU_1B).of(lengths)
    sums = np.array([costs[members].sum() for members in pack_balanced(lengths, CAPACITY, costs)])
    assert sums.max() / sums.mean() < 1.02


@pytest.mark.heavy
def test_a_hundred_thousand_samples_are_packed_in_seconds() -> None:
    lengths = length_mix("maths", 100_000, 0)
    started = time.process_time()
    packs = pack_balanced(lengths, CAPACITY, cost_model(PANGU_1B).of(lengths))
    assert time.process_time() - started < 10
    assert sum(map(len, packs)) == len(lengths)


def test_the_dearest_items_meet_the_cheapest() -> None:
    lengths = np.array([6, 2, 5, 3, 4, 4])
    packs = pack_balanced(lengths, 12, lengths**2)
    assert sorted(sorted(lengths[members].tolist()) for members in packs) == [[2, 4, 6], [3, 4, 5]]


# --- cost ---


def test_cost_of_a_layer_by_hand() -> None:
    dims = ModelDims(**(vars(PANGU_1B) | {"num_layers": 1}))
    model = cost_model(dims)
    matrices = [(1536, 1536), (1536, 768), (1536, 768), (1536, 1536), (1536, 6144), (1536, 6144), (6144, 1536)]
    assert model.linear == 6 * sum(rows * columns for rows, columns in matrices)
    # Forward q·k and p·v: 2 FLOPs for each of heads x head_dim x L² / 2 causal pairs; backward twice that.
    assert model.attention == 3 * 2 * 2 * 12 * 128 / 2
    head = 6.0 * 1536 * 153_376
    assert cost_model(PANGU_1B) == CostModel(26 * model.linear, 26 * model.attention, head)
    assert model.of(np.array([0, 10])).tolist() == [0, 10 * model.linear + 100 * model.attention]


# --- laying out ---


def test_rows_predict_exactly_the_response_tokens() -> None:
    generator = np.random.default_rng(1)
    samples = [make_sample(generator, prompt, response) for prompt, response in ((5, 3), (1, 1), (2, 7))]
    batch = collate(samples, capacity=32, top_k=3)
    assert batch.cu_seqlens.tolist() == [0, 7, 8, 16, 32]
    start, row = 0, 0
    for sample in samples:
        whole = np.concatenate([sample.prompt_ids, sample.response_ids])
        np.testing.assert_array_equal(batch.tokens[start : start + sample.length], whole[:-1])
        for offset in range(len(sample.response_ids)):
            position = batch.rows[row]
            assert position == start + len(sample.prompt_ids) - 1 + offset
            assert batch.targets[row] == whole[position - start + 1]  # the label is the next token of this sample
            np.testing.assert_array_equal(batch.topk_ids[row], sample.topk_ids[offset])
            assert batch.tail_mass[row] == sample.tail_mass[offset]
            row += 1
        start += sample.length
    assert row == len(batch.rows)


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=8),
    st.sampled_from([1, 2, 4, 8, 12]),
    st.data(),
)
def test_alignment_moves_sequences_and_changes_nothing_else(
    sizes: list[tuple[int, int]], alignment: int, data: st.DataObject
) -> None:
    generator = np.random.default_rng(0)
    samples = [make_sample(generator, *size) for size in sizes]
    used = sum(aligned(sample.length, alignment) for sample in samples)
    capacity = used + alignment * data.draw(st.integers(0, 1500 // alignment))
    batch, plain = collate(samples, capacity, 3, alignment), collate(samples, capacity, 3)
    assert len(batch.tokens) == batch.cu_seqlens[-1] == capacity
    assert not np.any(batch.cu_seqlens % alignment)
    assert np.all(np.diff(batch.cu_seqlens) > 0)
    for number, sample in enumerate(samples):
        start, end = batch.cu_seqlens[number], batch.cu_seqlens[number + 1]
        whole = np.concatenate([sample.prompt_ids, sample.response_ids])[:-1]
        assert batch.tokens[start:end].tolist() == whole.tolist() + [0] * (end - start - len(whole))
    # The same token, position and target under every row.
    np.testing.assert_array_equal(batch.tokens[batch.rows], plain.tokens[plain.rows])
    np.testing.assert_array_equal(positions_of(batch)[batch.rows], positions_of(plain)[plain.rows])
    for name in ("targets", "behaviour_logprobs", "topk_ids", "topk_logprobs", "tail_mass", "row_index"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(plain, name))


def test_a_capacity_that_is_no_multiple_of_the_alignment_is_refused() -> None:
    with pytest.raises(AssertionError, match="capacity 10 is no multiple of 4"):
        collate([], 10, 3, alignment=4)


def test_an_empty_pack_is_padding_alone() -> None:
    batch = collate([], capacity=8, top_k=3)
    assert batch.cu_seqlens.tolist() == [0, 8] and len(batch.rows) == 0 and batch.topk_ids.shape == (0, 3)


@pytest.mark.parametrize("alignment", [1, 12])
def test_padding_is_cut_into_short_sequences(alignment: int) -> None:
    """One padding sequence of a whole pack would be the dearest sequence of all."""
    batch = collate([], capacity=12 * 1000, top_k=3, alignment=alignment)
    lengths = np.diff(batch.cu_seqlens)
    assert lengths.sum() == 12000
    assert lengths.max() == aligned(PADDING_SEQUENCE, alignment)


def test_without_capacity_nothing_is_padded() -> None:
    tokens, cu_seqlens, rows = lay_out([(np.array([7]), np.array([8, 9])), (np.array([1, 2]), np.array([3]))])
    assert tokens.tolist() == [7, 8, 1, 2]
    assert cu_seqlens.tolist() == [0, 2, 4]
    assert rows.tolist() == [0, 1, 3]


def test_aligned_sequences_end_in_padding_ids() -> None:
    tokens, cu_seqlens, rows = lay_out([(np.array([7]), np.array([8, 9])), (np.array([1]), np.array([3]))], None, 5, 4)
    assert tokens.tolist() == [7, 8, 5, 5, 1, 5, 5, 5]
    assert cu_seqlens.tolist() == [0, 4, 8]
    assert rows.tolist() == [0, 1, 4]
