"""Operators on vocabulary-parallel logits against dense float64 references, fused and in plain torch.

Tensor parallelism is real: each rank is a thread with its own slice of the vocabulary and its own gloo group.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_npd import kernels
from megatron_npd.kernels import ce_topk_kl, forward_kl, native, token_logprobs, top_token, topk_logprobs
from megatron_npd.parallel import SINGLE, Parallel

TAILS = ("none", "bucket", "renormalize")
TOKENS, VOCAB, K = 24, 61, 5
LAYOUTS = [(1, 3), (2, 1), (4, 3)]
"""(tensor-parallel size, padding columns at the end of the vocabulary)"""
FIRST_IDS = (0, 16, 31, 32, 48)
"""Column 0 of every shard in these layouts: the column that another rank's ids must not alias to."""


def use_implementation(name: str) -> Iterator[None]:
    """The body of a fixture: what is behind the public functions while a test runs, "fused" or "reference"."""
    if name == "fused":
        if not native.run_on("cpu"):
            pytest.skip("the fused operators are not built, or disabled")
        yield
    else:
        with native.disabled():
            yield


@pytest.fixture(autouse=True, params=["fused", "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from use_implementation(request.param)


class Problem:
    """Random logits, targets and teacher; `FIRST_IDS` are among the targets and in the teacher's top-k."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        tokens: int = TOKENS,
        scale: float = 3.0,
        temperature: float = 1.0,
        vocab: int = VOCAB,
    ):
        generator = torch.Generator().manual_seed(0)
        self.temperature = temperature
        self.logits = (torch.randn(tokens, vocab, generator=generator) * scale).to(dtype)
        teacher = torch.randn(tokens, vocab, generator=generator).double() * 2
        first = torch.tensor([id for id in FIRST_IDS if id < vocab])
        teacher[torch.arange(tokens), first[torch.arange(tokens) % len(first)]] += 6.0
        logprobs, self.ids = (teacher / temperature).log_softmax(-1).topk(K, -1)
        self.logprobs = logprobs.float()
        self.tail_mass = (1 - logprobs.exp().sum(-1)).float()
        self.targets = torch.randint(0, vocab, (tokens,), generator=generator)
        self.targets[::2] = self.ids[::2, 1]
        self.targets[1::4] = first[torch.arange(len(self.targets[1::4])) % len(first)]
        self.upstream = torch.rand(tokens, generator=generator) / max(tokens, 1)

    def definition(self, logits: torch.Tensor, kd_lambda: float, tail: str) -> torch.Tensor:
        """The loss [T] as method.md writes it, from whole logits of any dtype."""
        dtype = logits.dtype
        log_q_S = (logits / self.temperature).log_softmax(-1).gather(1, self.ids)
        logprobs = self.logprobs.to(dtype)
        p = logprobs.exp()
        if tail == "renormalize":
            p = p / p.sum(-1, keepdim=True)
            kd = (p * (p.log() - log_q_S.log_softmax(-1))).sum(-1)
        else:
            kd = (p * (logprobs - log_q_S)).sum(-1)
        if tail == "bucket":
            mass = self.tail_mass.to(dtype)
            kd = kd + mass * (mass.log() - torch.log1p(-log_q_S.exp().sum(-1)))
        ce = -logits.log_softmax(-1).gather(1, self.targets[:, None])[:, 0]
        return (1 - kd_lambda) * ce + kd_lambda * self.temperature**2 * kd

    def reference(self, kd_lambda: float, tail: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss [T] and gradient [T, V] of Σ upstream·loss by autograd through the definition, float64."""
        logits = self.logits.double().requires_grad_()
        loss = self.definition(logits, kd_lambda, tail)
        (loss * self.upstream.double()).sum().backward()
        return loss.detach(), logits.grad

    def give_student_more_mass(self) -> None:
        """Halve the teacher's mass on S and leave the student nearly nothing outside: `none` is below 0 everywhere."""
        self.logprobs = self.logprobs - math.log(2)
        self.tail_mass = (1 - self.logprobs.double().exp().sum(-1)).float()
        swing = torch.tensor([0.3, -0.3] * K)[:K]  # within S they differ a little, so the gradient is not 0
        self.logits.scatter_(1, self.ids, (20 + (self.logprobs + swing) * self.temperature).to(self.logits.dtype))

    def labels(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.targets, self.ids, self.logprobs, self.tail_mass

    def ours(
        self, kd_lambda: float, tail: str, tp: int = 1, padding: int = 0, operators: ModuleType = kernels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient as `reference` gives them, by `ce_topk_kl` on `tp` ranks; padding must get no gradient."""
        loss, gradient, padding_gradient = self.ours_with_padding(kd_lambda, tail, tp, padding, operators)
        assert not padding_gradient.any(), "padding has a gradient"
        return loss, gradient

    def ours_with_padding(
        self, kd_lambda: float, tail: str, tp: int, padding: int, operators: ModuleType = kernels
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss [T], gradient [T, V] and gradient of the `padding` huge columns at the end of the vocabulary."""

        def work(parallel: Parallel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            shard, valid = shard_of(self.logits, parallel, padding)
            shard.requires_grad_()
            losses = operators.ce_topk_kl(
                shard,
                *self.labels(),
                kd_lambda=kd_lambda,
                tail=tail,
                temperature=self.temperature,
                parallel=parallel,
                valid=valid,
            )
            (losses.loss * self.upstream).sum().backward()
            return losses.loss.detach(), shard.grad[:, :valid], shard.grad[:, valid:]

        losses, gradients, padding_gradients = zip(*on_ranks(tp, work), strict=True)
        assert all(torch.equal(loss, losses[0]) for loss in losses), "ranks differ in their loss"
        return losses[0], torch.cat(gradients, 1), torch.cat(padding_gradients, 1)


def shard_of(whole: torch.Tensor, parallel: Parallel, padding: int) -> tuple[torch.Tensor, int]:
    """This rank's columns of whole logits, padded by huge ones, and how many of them are real."""
    padded = torch.nn.functional.pad(whole, (0, padding), value=50.0)  # would swallow the softmax if it entered
    columns = padded.shape[1] // parallel.tp_size
    start = parallel.tp_rank * columns
    valid = min(max(whole.shape[1] - start, 0), columns)
    return padded[:, start : start + columns].clone(), valid


def on_ranks(size: int, work: Callable[[Parallel], Any], sent: list[torch.Size] | None = None) -> list[Any]:
    """Run `work` on `size` tensor-parallel ranks (threads, each its own gloo group member).

    `sent` receives the shape of every tensor that rank 0 gives to a gather.
    """
    if size == 1:
        return [work(SINGLE)]
    store = dist.HashStore()
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=30))
            results[rank] = work(Parallel(tp_rank=rank, tp_size=size, tp_group=group))
        except BaseException as error:
            errors.append(error)

    def all_gather(parts: list[torch.Tensor], part: torch.Tensor, group: dist.ProcessGroupGloo) -> None:
        if sent is not None and group.rank() == 0:
            sent.append(part.shape)
        group.allgather([parts], [part]).wait()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    # Several ranks in one process cannot share torch's default group; their own groups do the same gather.
    with mock.patch.object(dist, "all_gather", all_gather):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return results


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """|ours - expected| / |expected|, 2-norms."""
    return float((ours.double() - expected).norm() / expected.norm())


def test_the_problem_has_the_awkward_cases() -> None:
    problem = Problem()
    inside = (problem.ids == problem.targets[:, None]).any(-1)
    assert inside.any() and not inside.all()
    for tp, padding in LAYOUTS:
        assert {*range(0, VOCAB, (VOCAB + padding) // tp)} <= set(FIRST_IDS)
    assert {*FIRST_IDS} <= {*problem.targets.tolist()}
    assert {*FIRST_IDS} <= {*problem.ids.flatten().tolist()}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("negative", [False, True])
def test_the_reference_has_the_slope_of_its_definition(tail: str, negative: bool) -> None:
    """Central differences in float64: the reference gradient, and ours, without any autograd."""
    problem = Problem(temperature=2.0)
    if negative:
        problem.give_student_more_mass()
    value, gradient = problem.reference(0.9, tail)
    ours = problem.ours(0.9, tail)[1].double()
    if negative and tail == "none":
        assert problem.definition(problem.logits.double(), 1.0, tail).max() < 0
    step = 1e-5
    for token in (0, 1, 2, 5, 6):
        outside = next(id for id in range(VOCAB) if id not in [*problem.ids[token], problem.targets[token]])
        for column in (
            int(problem.targets[token]),
            int(problem.ids[token, 0]),
            int(problem.ids[token, K - 1]),
            outside,
        ):
            up, down = problem.logits.double(), problem.logits.double()
            up[token, column] += step
            down[token, column] -= step
            rise = problem.definition(up, 0.9, tail) - problem.definition(down, 0.9, tail)
            slope = float(rise[token] * problem.upstream[token] / (2 * step))
            assert rise[torch.arange(TOKENS) != token].abs().max() == 0
            assert float(gradient[token, column]) == pytest.approx(slope, rel=1e-6, abs=1e-10)
            assert float(ours[token, column]) == pytest.approx(slope, rel=1e-4, abs=1e-7)
    assert value.isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kd_lambda", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("tp", "padding"), [(1, 0), *LAYOUTS])
def test_float32_equals_the_definition(tail: str, kd_lambda: float, tp: int, padding: int) -> None:
    problem = Problem()
    loss, gradient = problem.reference(kd_lambda, tail)
    our_loss, our_gradient = problem.ours(kd_lambda, tail, tp, padding)
    torch.testing.assert_close(our_loss.double(), loss, rtol=1e-5, atol=1e-5)
    assert relative_error(our_gradient, gradient) < 1e-5
    torch.testing.assert_close(our_gradient.double(), gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kd_lambda", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("tp", "padding"), LAYOUTS)
def test_bfloat16_gradient_is_rounded_once(tail: str, kd_lambda: float, tp: int, padding: int) -> None:
    """Against the float64 gradient of the same bf16 logits, as near as one rounding of it (1 / 256 at worst)."""
    problem = Problem(torch.bfloat16, tokens=96)
    loss, gradient = problem.reference(kd_lambda, tail)
    our_loss, our_gradient = problem.ours(kd_lambda, tail, tp, padding)
    assert our_gradient.dtype == torch.bfloat16
    torch.testing.assert_close(our_loss.double(), loss, rtol=1e-5, atol=1e-5)
    assert relative_error(our_gradient, gradient) < min(2e-3, 1.02 * relative_error(gradient.bfloat16(), gradient))
    places = torch.cat([problem.targets[:, None], problem.ids], 1)
    ours_S, expected_S = our_gradient.double().gather(1, places), gradient.gather(1, places)
    not_tiny = expected_S.abs() > 1e-3 * problem.upstream[:, None]
    assert not_tiny.any()
    assert ((ours_S - expected_S).abs() / expected_S.abs())[not_tiny].max() < 5e-3


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize(("tp", "padding"), LAYOUTS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature(tail: str, temperature: float, tp: int, padding: int, dtype: torch.dtype) -> None:
    problem = Problem(dtype, tokens=96, temperature=temperature)
    loss, gradient = problem.reference(0.9, tail)
    our_loss, our_gradient = problem.ours(0.9, tail, tp, padding)
    torch.testing.assert_close(our_loss.double(), loss, rtol=1e-5, atol=2e-5)
    assert relative_error(our_gradient, gradient) < (1e-5 if dtype == torch.float32 else 2e-3)


def test_kd_keeps_the_size_of_its_gradient_at_a_high_temperature() -> None:
    """τ²: for large τ the gradient tends to (z - z_teacher) / V of centred logits, and no longer depends on τ."""
    norms = []
    for temperature in (50.0, 100.0):
        problem = Problem(temperature=temperature)
        teacher = Problem(scale=1.0).logits.double()
        logprobs, problem.ids = (teacher / temperature).log_softmax(-1).topk(VOCAB - 1, -1)
        problem.logprobs, problem.tail_mass = logprobs.float(), (1 - logprobs.exp().sum(-1)).float()
        norms.append(float(problem.ours(1.0, "bucket")[1].norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize(("temperature", "floats"), [(1.0, 4), (2.0, 5)])
def test_only_a_few_floats_a_token_travel(temperature: float, floats: int) -> None:
    sent: list[torch.Size] = []
    problem = Problem(temperature=temperature)

    def work(parallel: Parallel) -> Any:
        shard, valid = shard_of(problem.logits, parallel, 1)
        shard.requires_grad_()
        settings = {"kd_lambda": 0.9, "tail": "bucket", "temperature": temperature}
        ce_topk_kl(shard, *problem.labels(), **settings, parallel=parallel, valid=valid).loss.sum().backward()
        return True

    on_ranks(2, work, sent)
    assert sent == [(floats, TOKENS)]


@pytest.mark.parametrize("tail", TAILS)
def test_more_tokens_than_a_chunk(tail: str) -> None:
    problem = Problem(tokens=700)
    loss, gradient = problem.reference(0.9, tail)
    our_loss, our_gradient = problem.ours(0.9, tail)
    torch.testing.assert_close(our_loss.double(), loss, rtol=1e-5, atol=1e-5)
    assert relative_error(our_gradient, gradient) < 1e-5


@pytest.mark.parametrize("tail", TAILS)
def test_a_rank_of_padding_alone(tail: str) -> None:
    """A vocabulary of 7 over 4 ranks of 3 columns: the last owns no token."""
    problem = Problem(vocab=7)
    loss, gradient = problem.reference(0.9, tail)
    our_loss, our_gradient = problem.ours(0.9, tail, 4, 5)
    torch.testing.assert_close(our_loss.double(), loss, rtol=1e-5, atol=1e-5)
    assert relative_error(our_gradient, gradient) < 1e-5


def test_no_tail_at_all_is_finite() -> None:
    """K = V: nothing outside the top-k, whatever the tail mode."""
    problem = Problem()
    problem.logprobs, problem.ids = torch.randn(TOKENS, VOCAB).log_softmax(-1).topk(VOCAB, -1)
    problem.tail_mass = torch.zeros(TOKENS)
    for tail in TAILS:
        for problem.temperature in (1.0, 2.0):
            loss, gradient = problem.ours(0.9, tail)
            assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_confident_student_and_teacher_stay_stable(temperature: float) -> None:
    """1 - Q far below float32 resolution: bucket's tail gradient comes from the tail's own softmax."""
    problem = Problem(temperature=temperature)
    problem.logits.scatter_(1, problem.ids, 60.0)
    problem.logprobs = torch.full((TOKENS, K), 1 / K).log()
    problem.tail_mass = torch.full((TOKENS,), 1e-7)
    loss, gradient = problem.ours(1.0, "bucket")
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_a_student_that_leaves_the_top_k_stays_stable() -> None:
    """Q far below float32's smallest number: renormalize compares within S all the same."""
    problem = Problem()
    problem.logits.scatter_add_(1, problem.ids, torch.full((TOKENS, K), -200.0))
    loss, gradient = problem.reference(1.0, "renormalize")
    our_loss, our_gradient = problem.ours(1.0, "renormalize")
    torch.testing.assert_close(our_loss.double(), loss, rtol=1e-4, atol=1e-4)
    assert relative_error(our_gradient, gradient) < 1e-4


def test_bad_arguments_are_refused() -> None:
    problem = Problem()
    problem.ids[3, 1] = problem.ids[3, 0]
    with pytest.raises(ValueError, match="unique"):
        problem.ours(0.9, "bucket")
    with pytest.raises(ValueError, match="must be none, bucket or renormalize"):
        Problem().ours(0.9, "other")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperatures_are_refused(temperature: float) -> None:
    problem = Problem()
    problem.temperature = temperature
    with pytest.raises(ValueError, match=r"temperature = .*: must be a positive finite number"):
        problem.ours(0.9, "bucket")
    with pytest.raises(ValueError, match=r"temperature = .*: must be a positive finite number"):
        topk_logprobs(problem.logits, K, SINGLE, VOCAB, temperature=temperature)


def test_teacher_equal_to_student_gives_no_kd() -> None:
    for temperature in (1.0, 2.0):
        problem = Problem(temperature=temperature)
        problem.ids, problem.logprobs, problem.tail_mass = topk_logprobs(
            problem.logits, K, SINGLE, VOCAB, temperature=temperature
        )
        for tail in ("bucket", "renormalize"):
            loss, gradient = problem.ours(1.0, tail)
            assert loss.abs().max() < 1e-5 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(("tp", "padding"), LAYOUTS)
def test_scores_equal_dense_float64(tp: int, padding: int, temperature: float) -> None:
    problem, other = Problem(), Problem(scale=1.0)
    log_q, log_p = problem.logits.double().log_softmax(-1), other.logits.double().log_softmax(-1)

    def work(parallel: Parallel) -> tuple:
        shard, valid = shard_of(problem.logits, parallel, padding)
        teacher, _ = shard_of(other.logits, parallel, padding)
        return (
            token_logprobs(shard, problem.targets, parallel, valid),
            topk_logprobs(shard, K, parallel, valid, temperature),
            forward_kl(teacher, shard, parallel, valid),
            top_token(shard, parallel, valid),
        )

    expected_top, expected_ids = (problem.logits.double() / temperature).log_softmax(-1).topk(K, -1)
    for logprobs, (ids, top, tail), kl, best in on_ranks(tp, work):
        expected = log_q.gather(1, problem.targets[:, None])[:, 0]
        torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(top.double(), expected_top, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(tail.double(), 1 - expected_top.exp().sum(-1), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(kl.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-5, atol=1e-5)
        assert torch.equal(best, log_q.argmax(-1))


@pytest.mark.parametrize(("vocab", "tokens", "padding"), [(7, 3, 5), (VOCAB, 0, 3)])
def test_scores_of_an_empty_shard_and_of_no_tokens(vocab: int, tokens: int, padding: int) -> None:
    logits, targets = torch.randn(tokens, vocab), torch.randint(0, vocab, (tokens,))

    def work(parallel: Parallel) -> tuple:
        shard, valid = shard_of(logits, parallel, padding)
        return (
            token_logprobs(shard, targets, parallel, valid),
            *topk_logprobs(shard, 4, parallel, valid),
            forward_kl(shard * 0.5, shard, parallel, valid),
            top_token(shard, parallel, valid),
        )

    (alone,) = on_ranks(1, work)
    for scores in on_ranks(4, work):
        for ours, expected in zip(scores, alone, strict=True):
            torch.testing.assert_close(ours, expected)


def test_a_nan_logit_reaches_the_score() -> None:
    problem = Problem()
    problem.logits[4, 7] = torch.nan
    scores = token_logprobs(problem.logits, problem.targets, SINGLE, VOCAB)
    assert scores[4].isnan() and scores[:4].isfinite().all()
