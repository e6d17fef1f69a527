"""Operators on vocabulary-parallel logits against dense float64 references, and the known faults of others.

Tensor parallelism is real: each rank is a thread with its own slice of the vocabulary and its own gloo group.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_npd.kernels import ce_topk_kl, forward_kl, token_logprobs, top_token, topk_logprobs
from megatron_npd.parallel import SINGLE, Parallel

TAILS = ("none", "bucket", "renormalize")
TOKENS, VOCAB, K = 24, 61, 5


class Problem:
    """Random logits and teacher in float64; targets inside and outside the top-k, ids in column 0 of every shard."""

    def __init__(self, dtype: torch.dtype = torch.float32, tokens: int = TOKENS, scale: float = 3.0):
        generator = torch.Generator().manual_seed(0)
        self.logits = (torch.randn(tokens, VOCAB, generator=generator) * scale).to(dtype)
        teacher = torch.randn(tokens, VOCAB, generator=generator).double() * 2
        teacher[:, 0] += 4.0  # id 0 is in most top-k: the column that foreign ids wrongly alias to
        logprobs, self.ids = teacher.log_softmax(-1).topk(K, -1)
        self.logprobs = logprobs.float()
        self.tail_mass = (1 - logprobs.exp().sum(-1)).float()
        self.targets = torch.randint(0, VOCAB, (tokens,), generator=generator)
        self.targets[::2] = self.ids[::2, 1]
        self.upstream = torch.rand(tokens, generator=generator) / tokens

    def reference(self, kd_lambda: float, tail: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss [T] and gradient [T, V] by autograd through the definition, float64."""
        logits = self.logits.double().requires_grad_()
        log_q = logits.log_softmax(-1)
        p, log_q_S = self.logprobs.double().exp(), log_q.gather(1, self.ids)
        if tail == "renormalize":
            p = p / p.sum(-1, keepdim=True)
            kd = (p * (p.log() - log_q_S.log_softmax(-1))).sum(-1)
        else:
            kd = (p * (self.logprobs.double() - log_q_S)).sum(-1)
        if tail == "bucket":
            mass = self.tail_mass.double()
            kd = kd + mass * (mass.log() - torch.log1p(-log_q_S.exp().sum(-1)))
        loss = (1 - kd_lambda) * -log_q.gather(1, self.targets[:, None])[:, 0] + kd_lambda * kd
        (loss * self.upstream.double()).sum().backward()
        return loss.detach(), logits.grad

    def ours(self, kd_lambda: float, tail: str, parallel: Parallel = SINGLE, padding: int = 0) -> tuple:
        """Loss [T] and this rank's gradient, with `padding` huge columns at the end of the whole vocabulary."""
        shard, valid = shard_of(self.logits, parallel, padding)
        shard = shard.requires_grad_()
        losses = ce_topk_kl(
            shard,
            self.targets,
            self.ids,
            self.logprobs,
            self.tail_mass,
            kd_lambda=kd_lambda,
            tail=tail,
            parallel=parallel,
            valid=valid,
        )
        (losses.loss * self.upstream).sum().backward()
        return losses.loss.detach(), shard.grad, valid


def shard_of(logits: torch.Tensor, parallel: Parallel, padding: int) -> tuple[torch.Tensor, int]:
    padded = torch.nn.functional.pad(logits, (0, padding), value=50.0)  # would swallow the softmax if it entered
    columns = padded.shape[1] // parallel.tp_size
    start = parallel.tp_rank * columns
    valid = min(max(logits.shape[1] - start, 0), columns)
    return padded[:, start : start + columns].clone(), valid


def on_ranks(size: int, work: Callable[[Parallel], Any], folder: Path) -> list[Any]:
    """Run `work` on `size` tensor-parallel ranks (threads, each its own gloo group member)."""
    store = dist.FileStore(str(folder / f"store{size}"), size)
    results: list[Any] = [None] * size

    def rank_main(rank: int) -> None:
        group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
        results[rank] = work(Parallel(tp_rank=rank, tp_size=size, tp_group=GlooGroup(group)))

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result is not None for result in results), "a rank failed; its traceback is above"
    return results


class GlooGroup:
    """A process group outside the default one: `all_gather` below sends to it."""

    def __init__(self, group: dist.ProcessGroupGloo):
        self.group = group


@pytest.fixture(autouse=True)
def gather_over_own_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranks in one process cannot share torch's default group; their own groups do the same gather."""

    def all_gather(parts: list[torch.Tensor], part: torch.Tensor, group: GlooGroup) -> None:
        group.group.allgather([parts], [part]).wait()

    monkeypatch.setattr(dist, "all_gather", all_gather)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kd_lambda", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("tp, padding", [(1, 0), (1, 3), (2, 1), (4, 3)])
def test_loss_and_gradient_equal_the_definition(
    tail: str, kd_lambda: float, tp: int, padding: int, tmp_path: Path
) -> None:
    problem = Problem()
    loss, gradient = problem.reference(kd_lambda, tail)

    def work(parallel: Parallel) -> tuple:
        return problem.ours(kd_lambda, tail, parallel, padding)

    results = on_ranks(tp, work, tmp_path) if tp > 1 else [work(SINGLE)]
    for rank_loss, rank_gradient, valid in results:
        torch.testing.assert_close(rank_loss.double(), loss, rtol=1e-5, atol=1e-5)
        assert not rank_gradient[:, valid:].any()
    ours = torch.cat([rank_gradient[:, :valid] for _, rank_gradient, valid in results], 1)
    torch.testing.assert_close(ours.double(), gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tail", TAILS)
def test_bfloat16_gradient_is_rounded_once(tail: str) -> None:
    problem = Problem(torch.bfloat16)
    _, gradient = problem.reference(0.9, tail)
    ours = problem.ours(0.9, tail)[1].double()
    assert ours.dtype == torch.float64
    assert (ours - gradient).norm() / gradient.norm() < 2e-3


def test_more_tokens_than_a_chunk() -> None:
    problem = Problem(tokens=700)
    loss, gradient = problem.reference(0.9, "bucket")
    our_loss, our_gradient, _ = problem.ours(0.9, "bucket")
    torch.testing.assert_close(our_loss.double(), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_gradient.double(), gradient, rtol=1e-4, atol=1e-8)


def test_known_fault_gradient_without_teacher_mass() -> None:
    """A backward of q - p leaves out P: with `none` the gradient must sum to zero over the vocabulary."""
    gradient = Problem().ours(1.0, "none")[1]
    assert gradient.sum(-1).abs().max() < 1e-6


def test_known_fault_clamped_truncated_sum() -> None:
    """The `none` form is no KL: where it is negative it stays negative, and its gradient lives."""
    problem = Problem()
    problem.logits.scatter_(1, problem.ids, 12.0)  # the student puts more mass on S than the teacher does
    loss, gradient, _ = problem.ours(1.0, "none")
    assert loss.min() < 0
    assert gradient[loss < 0].abs().sum() > 0


def test_no_tail_at_all_is_finite() -> None:
    """K = V: nothing outside the top-k, whatever the tail mode."""
    problem = Problem()
    problem.logprobs, problem.ids = torch.randn(TOKENS, VOCAB).log_softmax(-1).topk(VOCAB, -1)
    problem.tail_mass = torch.zeros(TOKENS)
    for tail in TAILS:
        loss, gradient, _ = problem.ours(0.9, tail)
        assert loss.isfinite().all() and gradient.isfinite().all()


def test_confident_student_and_teacher_stay_stable() -> None:
    """1 - Q far below float32 resolution: bucket's tail gradient comes from the tail's own softmax."""
    problem = Problem()
    problem.logits.scatter_(1, problem.ids, 60.0)
    problem.logprobs = torch.full((TOKENS, K), 1 / K).log()
    problem.tail_mass = torch.full((TOKENS,), 1e-7)
    loss, gradient, _ = problem.ours(1.0, "bucket")
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_ids_twice_and_unknown_tails_are_refused() -> None:
    problem = Problem()
    problem.ids[3, 1] = problem.ids[3, 0]
    with pytest.raises(ValueError, match="unique"):
        problem.ours(0.9, "bucket")
    with pytest.raises(ValueError, match="must be none, bucket or renormalize"):
        Problem().ours(0.9, "other")


def test_teacher_equal_to_student_gives_no_kd() -> None:
    problem = Problem()
    log_q = problem.logits.double().log_softmax(-1)
    logprobs, problem.ids = log_q.topk(K, -1)
    problem.logprobs, problem.tail_mass = logprobs.float(), (1 - logprobs.exp().sum(-1)).float()
    for tail in ("bucket", "renormalize"):
        loss, gradient, _ = problem.ours(1.0, tail)
        assert loss.abs().max() < 1e-5 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("tp, padding", [(1, 3), (2, 1), (4, 3)])
def test_scores_equal_dense_float64(tp: int, padding: int, tmp_path: Path) -> None:
    problem, other = Problem(), Problem(scale=1.0)
    log_q, log_p = problem.logits.double().log_softmax(-1), other.logits.double().log_softmax(-1)

    def work(parallel: Parallel) -> tuple:
        shard, valid = shard_of(problem.logits, parallel, padding)
        teacher, _ = shard_of(other.logits, parallel, padding)
        return (
            token_logprobs(shard, problem.targets, parallel, valid),
            topk_logprobs(shard, K, parallel, valid),
            forward_kl(teacher, shard, parallel, valid),
            top_token(shard, parallel, valid),
        )

    results = on_ranks(tp, work, tmp_path) if tp > 1 else [work(SINGLE)]
    expected_top, expected_ids = log_q.topk(K, -1)
    for logprobs, (ids, top, tail), kl, best in results:
        torch.testing.assert_close(
            logprobs.double(), log_q.gather(1, problem.targets[:, None])[:, 0], rtol=1e-6, atol=1e-6
        )
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(top.double(), expected_top, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(tail.double(), 1 - expected_top.exp().sum(-1), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(kl.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-5, atol=1e-5)
        assert torch.equal(best, log_q.argmax(-1))


def test_a_nan_logit_reaches_the_score() -> None:
    problem = Problem()
    problem.logits[4, 7] = torch.nan
    scores = token_logprobs(problem.logits, problem.targets, SINGLE, VOCAB)
    assert scores[4].isnan() and scores[:4].isfinite().all()
