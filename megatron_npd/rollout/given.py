"""Responses that the user's data gives, as shards like those that were sampled. No engine is needed."""

from __future__ import annotations

import numpy as np

from megatron_npd.buffer.plan import sampling_seed
from megatron_npd.buffer.shards import Shard, concatenate_ragged
from megatron_npd.buffer.work import WorkUnit
from megatron_npd.data.prompts import PromptSet
from megatron_npd.schema import GIVEN_VERSION, ROLLOUT_COLUMNS, FinishReason


def given_shard(unit: WorkUnit, prompts: PromptSet, run_seed: int) -> Shard:
    """A unit of given responses as a `rollouts` shard: of no version, without logprobs, each with its end token."""
    stage, number = unit
    rows = stage.rows(number)
    indices, samples = stage.prompt_index[rows], stage.sample_index[rows]
    prompt_ids, prompt_offsets = concatenate_ragged([prompts[index] for index in indices], "int32")
    response_ids, response_offsets = concatenate_ragged([prompts.response(index) for index in indices], "int32")
    count = len(indices)
    columns = {
        "prompt_index": indices,
        "sample_index": samples,
        "seed": [sampling_seed(run_seed, stage.name, *pair) for pair in zip(indices, samples, strict=True)],
        "policy_version": np.full(count, GIVEN_VERSION),
        "finish_reason": np.full(count, FinishReason.STOP),
        "prompt_ids": prompt_ids,
        "prompt_offsets": prompt_offsets,
        "response_ids": response_ids,
        "response_offsets": response_offsets,
        "behaviour_logprobs": np.full(len(response_ids), np.nan),
    }
    typed = {name: np.asarray(column, dtype=ROLLOUT_COLUMNS[name][0]) for name, column in columns.items()}
    return Shard("rollouts", typed, {"stage": stage.name, "unit": number})
