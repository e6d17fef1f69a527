"""The near-policy KL of a batch in which some responses are given: of the others alone, and of all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_npd.config import TrainingConfig
from megatron_npd.data.batch import TrainingSample, collate
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.mcore.model import ModelOptions, build_gpt
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.training.step import StepSums, collect_sums, forward_step, logprob_step
from megatron_npd.training.step_metrics import StepReport

DIMS = ModelDims("llama", 128, 64, 96, 1, 2, 1, 32, 1e-5, 1e4, 512, True)
TOP_K = 3


def sample(seed: int, given: bool) -> TrainingSample:
    generator = np.random.default_rng(seed)
    prompt, response = generator.integers(2, 6), generator.integers(3, 9)
    logprobs = np.log(generator.dirichlet(np.ones(TOP_K + 1), response)).astype(np.float32)
    behaviour = np.full(response, np.nan) if given else -4.8 - generator.random(response)
    return TrainingSample(
        generator.integers(0, 128, prompt).astype(np.int32),
        generator.integers(0, 128, response).astype(np.int32),
        behaviour.astype(np.float32),
        np.stack([generator.choice(128, TOP_K, replace=False) for _ in range(response)]).astype(np.int32),
        logprobs[:, :TOP_K],
        np.exp(logprobs[:, TOP_K]),
    )


@pytest.mark.parametrize("given", [(), (1, 3), (0, 1, 2, 3)])
def test_drift_is_of_sampled_responses_alone(given: tuple[int, ...], parallel: Parallel) -> None:
    samples = [sample(number, number in given) for number in range(4)]
    batch = collate(samples, 128, TOP_K)
    [model] = build_gpt(DIMS, parallel, torch.float32, ModelOptions("reference"))

    output, loss = forward_step(TrainingConfig(), DIMS, parallel)(iter([batch]), model)
    total, tokens, reported = loss(output)
    sums: StepSums = collect_sums([reported], parallel)
    _, score = logprob_step(DIMS, parallel, 64)(iter([batch]), model)
    logprobs = score(output)[2]["logprobs"].double().detach().numpy()

    own = ~np.isnan(batch.behaviour_logprobs)
    log_ratio = (logprobs - batch.behaviour_logprobs.astype(np.float64))[own]
    expected = float(np.sum(np.exp(log_ratio) * log_ratio - np.exp(log_ratio) + 1))
    assert sums.sampled == own.sum() and sums.tokens == len(own) == int(tokens)
    assert sums.drift == pytest.approx(expected, rel=1e-5, abs=0)
    report = StepReport(sums, 1.0, 1e-5, 1.0, 128, 100, 1.0, 1.0, policy_lag=1)
    assert report.drift == (pytest.approx(expected / own.sum(), rel=1e-5) if own.any() else None)
    assert report.metrics()["near_policy/lag"] == (1 if own.any() else None), "what was given has no policy"
    total.backward()
    gradients = [p.main_grad if hasattr(p, "main_grad") else p.grad for p in model.parameters()]
    assert all(g is None or bool(g.isfinite().all()) for g in gradients)
    assert math.isfinite(sums.loss) and any(g is not None and bool(g.any()) for g in gradients)
