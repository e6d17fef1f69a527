"""The fused CUDA operators on the device itself, against float64 of the same logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from loss_problem import definition

from megatron_npd.distributed.parallel import SINGLE
from megatron_npd.kernels import native, token_logprobs, topk_logprobs
from megatron_npd.kernels.objective import (
    TAILS,
    Labels,
    Objective,
    merge_statistics,
    partial_statistics,
    token_losses,
    write_gradient,
)
from megatron_npd.kernels.vocab_parallel import VocabShard

ROWS, K, KD_LAMBDA = 67, 10, 0.9
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Dtype of the logits -> what rounding a gradient to it may change, relative."""
COLUMNS = [61, 4096, 49_152, 131_071, 153_376]
"""A few; a power of two; what 16-byte vectors fit, and what they do not; openPangu's, whose rows are 8-byte aligned."""
NATS = 5e-6
"""What float32 sums of exponentials may be off."""


@pytest.fixture(autouse=True)
def fused() -> None:
    assert native.run_on("cuda"), "build the kernels first: python -m megatron_npd.kernels.build"


@dataclass
class OnDevice:
    """Logits with padding columns behind the real ones, and a teacher; on the GPU, and as float64."""

    logits: torch.Tensor
    real: torch.Tensor
    labels: Labels

    @classmethod
    def of(cls, columns: int, dtype: torch.dtype, padding: int = 5) -> OnDevice:
        generator = torch.Generator("cuda").manual_seed(columns)
        logits = (torch.randn(ROWS, columns + padding, device="cuda", generator=generator) * 3).to(dtype)
        logits[:, columns:] = 60.0  # would show in every sum
        teacher = torch.randn(ROWS, columns, device="cuda", generator=generator) * 2
        logprobs, ids = teacher.log_softmax(-1).topk(min(K, columns - 1), -1)
        targets = torch.randint(0, columns, (ROWS,), device="cuda", generator=generator)
        targets[::2] = ids[::2, 1]
        labels = Labels(targets, ids, logprobs, 1 - logprobs.exp().sum(-1))
        return cls(logits, logits[:, :columns].double(), labels)

    def shards(self, count: int) -> list[tuple[torch.Tensor, VocabShard]]:
        """The same columns as `count` tensor-parallel ranks hold them, with padding at the end of the vocabulary."""
        whole = self.logits[:, : self.logits.shape[1] // count * count]
        valid = min(self.real.shape[1], whole.shape[1])
        parts = whole.chunk(count, 1)
        width = parts[0].shape[1]
        return [
            (part, VocabShard(rank * width, min(max(valid - rank * width, 0), width)))
            for rank, part in enumerate(parts)
        ]


def by_autograd(problem: OnDevice, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each row by its definition, float64, and its gradient."""
    z, labels = problem.real.clone().requires_grad_(), problem.labels
    given = (labels.targets_T, labels.ids_TK, labels.logprobs_TK, labels.tail_mass_T)
    loss = definition(z, *given, objective.kd_lambda, objective.tail, objective.temperature)
    loss.sum().backward()
    return loss.detach(), z.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_scores_equal_float64(columns: int, dtype: torch.dtype) -> None:
    problem = OnDevice.of(columns, dtype)
    log_q = problem.real.log_softmax(-1)
    ours = token_logprobs(problem.logits, problem.labels.targets_T, SINGLE, columns)
    assert (ours - log_q.gather(1, problem.labels.targets_T[:, None])[:, 0]).abs().max() < NATS


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_topk_equals_float64(columns: int, dtype: torch.dtype, temperature: float) -> None:
    problem = OnDevice.of(columns, dtype)
    log_q = (problem.real / temperature).log_softmax(-1)
    ids, logprobs, tail = topk_logprobs(problem.logits, K, SINGLE, columns, temperature)
    best = log_q.topk(K, -1).values
    assert (logprobs - best).abs().max() < NATS
    assert (log_q.gather(1, ids) - best).abs().max() == 0, "the ids' own logits are the best ones"
    assert all(len(set(row)) == K for row in ids.tolist())
    assert (tail - (1 - best.exp().sum(-1))).abs().max() < NATS


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [61, 49_152, 153_376])
def test_loss_and_gradient_equal_float64(
    columns: int, dtype: torch.dtype, tail: str, temperature: float, shards: int
) -> None:
    """Also as the ranks of a tensor-parallel group hold the columns, whose statistics are merged."""
    problem, objective = OnDevice.of(columns, dtype), Objective(KD_LAMBDA, tail, temperature)
    problem = cut_to_shards(problem, shards)
    expected, gradient = by_autograd(problem, objective)
    parts = problem.shards(shards)
    partials = [partial_statistics(logits, problem.labels, objective, shard) for logits, shard in parts]
    statistics = merge_statistics(torch.stack(partials))
    losses = token_losses(statistics, problem.labels, objective)
    assert relative(losses.loss, expected) < 1e-5
    written = []
    for logits, shard in parts:
        into = logits.contiguous()
        write_gradient(into, into, torch.ones(ROWS, device="cuda"), statistics, problem.labels, objective, shard)
        assert not into[:, shard.valid :].any(), "padding has no gradient"
        written.append(into[:, : shard.valid])
    assert relative(torch.cat(written, 1), gradient) < DTYPES[dtype] + 2e-5


def cut_to_shards(problem: OnDevice, shards: int) -> OnDevice:
    """Without the columns that do not divide: the last shards' padding stays."""
    width = problem.logits.shape[1] // shards * shards
    real = problem.real[:, : min(width, problem.real.shape[1])]
    assert problem.labels.ids_TK.max() < real.shape[1] and problem.labels.targets_T.max() < real.shape[1]
    return OnDevice(problem.logits[:, :width], real, problem.labels)


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.double() - expected).norm() / expected.norm())


def test_the_same_bits_every_time() -> None:
    problem = OnDevice.of(153_376, torch.bfloat16)
    arguments: tuple[Any, ...] = (problem.logits, K, SINGLE, 153_376)
    first, second = topk_logprobs(*arguments), topk_logprobs(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    scores = [token_logprobs(problem.logits, problem.labels.targets_T, SINGLE, 153_376) for _ in range(2)]
    assert torch.equal(*scores)


def test_a_nan_logit_reaches_the_score() -> None:
    problem = OnDevice.of(4096, torch.bfloat16)
    problem.logits[3, 77] = torch.nan
    scores = token_logprobs(problem.logits, problem.labels.targets_T, SINGLE, 4096)
    assert scores.isnan().nonzero().tolist() == [[3]]


def test_the_reference_on_the_device_is_the_reference() -> None:
    """In chunks of its own size, by scatters that ask nothing."""
    problem, objective = OnDevice.of(4096, torch.float32), Objective(KD_LAMBDA, "bucket")
    _, gradient = by_autograd(problem, objective)
    shard, ones = VocabShard(0, 4096), torch.ones(ROWS, device="cuda")
    with native.disabled():
        statistics = merge_statistics(partial_statistics(problem.logits, problem.labels, objective, shard)[None])
        into = torch.empty_like(problem.logits)
        write_gradient(problem.logits, into, ones, statistics, problem.labels, objective, shard)
    assert relative(into[:, :4096], gradient) < 2e-5
