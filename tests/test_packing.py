"""Packing and collating: nothing lost, nothing misaligned."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_npd.data.packing import TrainingSample, collate, lay_out, pack


def make_sample(generator: np.random.Generator, prompt: int, response: int, k: int = 3) -> TrainingSample:
    ids = generator.integers(1, 1000, prompt + response).astype(np.int32)
    return TrainingSample(
        prompt_ids=ids[:prompt],
        response_ids=ids[prompt:],
        behaviour_logprobs=-generator.random(response).astype(np.float32),
        topk_ids=generator.integers(0, 1000, (response, k)).astype(np.int32),
        topk_logprobs=-generator.random((response, k)).astype(np.float32),
        tail_mass=generator.random(response).astype(np.float32),
    )


@given(st.lists(st.integers(1, 100), max_size=200))
def test_pack_is_a_partition_within_capacity(lengths: list[int]) -> None:
    packs = pack(np.array(lengths, dtype=np.int64), 100)
    assert sorted(item for items in packs for item in items) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in items) <= 100 for items in packs)


def test_pack_fills_realistic_lengths() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6.0, 0.8, 5000).astype(int), 16, 8192)
    packs = pack(lengths, 32768)
    assert lengths.sum() / (len(packs) * 32768) > 0.98


def test_pack_refuses_what_cannot_fit() -> None:
    with pytest.raises(ValueError, match="item 1 has 11 tokens, capacity is 10"):
        pack(np.array([3, 11]), 10)


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


def test_an_empty_pack_is_padding_alone() -> None:
    batch = collate([], capacity=8, top_k=3)
    assert batch.cu_seqlens.tolist() == [0, 8] and len(batch.rows) == 0 and batch.topk_ids.shape == (0, 3)


def test_without_capacity_nothing_is_padded() -> None:
    tokens, cu_seqlens, rows = lay_out([(np.array([7]), np.array([8, 9])), (np.array([1, 2]), np.array([3]))])
    assert tokens.tolist() == [7, 8, 1, 2]
    assert cu_seqlens.tolist() == [0, 2, 4]
    assert rows.tolist() == [0, 1, 3]
