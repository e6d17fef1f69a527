"""A prepared run directory whose stages are already annotated: what a trainer needs, without any other role.

Tokens, scores and teacher annotation are random but valid; the files are written by the real writer.
"""

from __future__ import annotations

import numpy as np
from inputs import Inputs

from megatron_npd.buffer.plan import Stage, plan_of
from megatron_npd.buffer.shards import Shard, concatenate_ragged, write_shard
from megatron_npd.config import Config
from megatron_npd.data.prompts import load_prompt_set
from megatron_npd.prepare.prepare import prepare
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import COLUMNS, ROLLOUT_COLUMNS, Verdict

VOCABULARY = 128


def make_buffer(inputs: Inputs, with_rollouts: bool = False) -> RunDirectory:
    """Prepare the run directory of a configuration and annotate every stage that is trained on.

    `with_rollouts`: with the shards that the annotators had read, as a report counts them.
    """
    config = inputs.config
    run = prepare(config)
    for stage in plan_of(run, config).training_stages:
        for unit in range(stage.units):
            annotated = _annotated_unit(run, config, stage, unit)
            write_shard(run.unit("samples", stage.name, unit), annotated)
            if with_rollouts:
                columns = {name: annotated[name] for name in ROLLOUT_COLUMNS}
                write_shard(run.unit("rollouts", stage.name, unit), Shard("rollouts", columns, {}))
    return run


def _annotated_unit(run: RunDirectory, config: Config, stage: Stage, unit: int) -> Shard:
    """Random responses to a unit's prompts, or the given ones; every fourth sample is rejected."""
    generator = np.random.default_rng([unit, stage.version + 1])
    prompts, rows, given = load_prompt_set(run.prompts(stage.split)), stage.rows(unit), stage.is_given(unit)
    prompt_index = stage.prompt_index[rows]
    count, k = len(prompt_index), config.annotator.top_k
    verdict = np.where(np.arange(count) % 4 == 3, Verdict.DEGENERATE, Verdict.KEPT).astype(np.uint8)
    lengths = generator.integers(2, config.rollout.max_new_tokens, count)
    if given:
        lengths = np.array([len(prompts.response(int(index))) for index in prompt_index])
    annotated = int(lengths[verdict == Verdict.KEPT].sum())
    probabilities = generator.dirichlet(np.ones(k + 1), annotated)
    prompt_ids, prompt_offsets = concatenate_ragged([np.asarray(prompts[int(i)]) for i in prompt_index], "int32")
    responses = [generator.integers(3, VOCABULARY, length) for length in lengths]
    if given:
        responses = [prompts.response(int(index)) for index in prompt_index]
    response_ids, response_offsets = concatenate_ragged(responses, "int32")
    kept = [response if one == Verdict.KEPT else response[:0] for response, one in zip(responses, verdict, strict=True)]
    _, topk_offsets = concatenate_ragged(kept, "int32")
    columns = {name: np.zeros(count, dtype) for name, (dtype, shape) in COLUMNS["samples"].items() if shape == "N"}
    columns |= {
        "prompt_index": prompt_index,
        "sample_index": stage.sample_index[rows],
        "policy_version": np.full(count, stage.version_of(unit), np.int32),
        "verdict": verdict,
        "prompt_ids": prompt_ids,
        "prompt_offsets": prompt_offsets,
        "response_ids": response_ids,
        "response_offsets": response_offsets,
        "behaviour_logprobs": (np.nan if given else -1)
        * generator.exponential(1.0, len(response_ids)).astype("float32"),
        "topk_offsets": topk_offsets,
        "topk_ids": np.stack([generator.permutation(VOCABULARY)[:k] for _ in range(annotated)]).astype(np.int32),
        "topk_logprobs": -np.sort(-np.log(probabilities[:, :k])).astype(np.float32),
        "tail_mass": probabilities[:, k].astype(np.float32),
    }
    return Shard("samples", columns, {"kd_temperature": str(config.training.kd_temperature)})
