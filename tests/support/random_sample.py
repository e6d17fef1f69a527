"""A training sample of random content."""

from __future__ import annotations

import itertools

import numpy as np

from megatron_npd.data.batch import PackedBatch, TrainingSample


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


def positions_of(batch: PackedBatch) -> np.ndarray:
    """Position of every token of a whole pack inside its own sequence, int64 [T]."""
    bounds = batch.cu_seqlens
    sequences = [np.arange(end - start) for start, end in itertools.pairwise(bounds)]
    return np.concatenate([np.zeros(0, np.int64), *sequences])
