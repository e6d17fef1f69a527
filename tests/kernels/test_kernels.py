"""Operators on vocabulary-parallel logits against dense float64 references, fused and in plain torch.

Tensor parallelism is real: each rank is a thread with its own slice of the vocabulary and its own gloo group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loss_problem import (
    FIRST_IDS,
    LAYOUTS,
    TAILS,
    TOKENS,
    VOCAB,
    K,
    Problem,
    on_ranks,
    relative_error,
    shard_of,
    use_implementation,
)

from megatron_npd.distributed.parallel import SINGLE, Parallel
from megatron_npd.kernels import ce_topk_kl, forward_kl, token_logprobs, top_token, topk_logprobs


@pytest.fixture(autouse=True, params=["fused", "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from use_implementation(request.param)


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
