"""The loss of hidden states: equal to the dense definition through the projection, and never more than a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loss_problem import LAYOUTS, TAILS, TOKENS, VOCAB, Problem, on_ranks, relative_error, shard_of, use_implementation
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_npd.distributed.parallel import SINGLE, Parallel
from megatron_npd.kernels import LinearLosses, ce_topk_kl, linear_ce_topk_kl
from megatron_npd.kernels.vocab_parallel import CHUNK

HIDDEN = 16
KD_LAMBDA = 0.9


@pytest.fixture(params=["fused", "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from use_implementation(request.param)


both = pytest.mark.usefixtures("implementation")
"""A test of numbers or memory runs with the fused operators and with the reference."""


class HeadProblem(Problem):
    """A `Problem` whose logits are hidden @ weight.T."""

    def __init__(self, dtype: torch.dtype = torch.float32, tokens: int = TOKENS, temperature: float = 1.0):
        super().__init__(dtype, tokens, temperature=temperature)
        generator = torch.Generator().manual_seed(1)
        self.hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
        self.weight = (torch.randn(VOCAB, HIDDEN, generator=generator) * 0.75).to(dtype)

    def dense(self, dtype: torch.dtype, tail: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss [N], d_hidden and d_weight of the summed loss by autograd, projecting in `dtype`.

        The loss itself is computed in float64 from float64 logits, and in float32 otherwise.
        """
        hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (self.hidden, self.weight))
        logits = hidden @ weight.T
        loss = self.definition(logits if dtype == torch.float64 else logits.float(), KD_LAMBDA, tail)
        loss.sum().backward()
        return loss.detach(), hidden.grad, weight.grad

    def shard(self, parallel: Parallel, padding: int) -> tuple[torch.Tensor, int]:
        """This rank's rows of the weight, with huge padding at the end, and how many of them are real."""
        columns, valid = shard_of(self.weight.T, parallel, padding)
        return columns.T.contiguous(), valid

    def losses(
        self, hidden: torch.Tensor, weight: torch.Tensor, parallel: Parallel = SINGLE, **changes: Any
    ) -> LinearLosses:
        settings = {"kd_lambda": KD_LAMBDA, "tail": "bucket", "valid": VOCAB, "temperature": self.temperature}
        return linear_ce_topk_kl(hidden, weight, *self.labels(), parallel=parallel, **{**settings, **changes})

    def linear(
        self, tp: int, padding: int, tail: str = "bucket", chunk_tokens: int = 4096, upstream: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss [N], d_hidden summed over ranks in float64 and d_weight, by `linear_ce_topk_kl` on `tp` ranks."""

        def work(parallel: Parallel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            weight, valid = self.shard(parallel, padding)
            hidden = self.hidden.clone().requires_grad_()
            weight.requires_grad_()
            losses = self.losses(hidden, weight, parallel, valid=valid, tail=tail, chunk_tokens=chunk_tokens)
            assert not any(x.requires_grad for x in (losses.loss, losses.ce, losses.kd))
            assert torch.equal(losses.total.detach(), losses.loss.sum())
            (losses.total * upstream).backward()
            assert hidden.grad.dtype == weight.grad.dtype == self.hidden.dtype
            assert not weight.grad[valid:].any()
            return losses.loss, hidden.grad, weight.grad[:valid]

        loss, d_hidden, d_weight = zip(*on_ranks(tp, work), strict=True)
        assert all(torch.equal(rank_loss, loss[0]) for rank_loss in loss)
        return loss[0], torch.stack(d_hidden).double().sum(0), torch.cat(d_weight)


@both
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 4096])
@pytest.mark.parametrize(("tp", "padding"), LAYOUTS)
def test_float32_equals_the_definition(tail: str, chunk_tokens: int, tp: int, padding: int) -> None:
    problem = HeadProblem()
    loss, d_hidden, d_weight = problem.dense(torch.float64, tail)
    our_loss, our_d_hidden, our_d_weight = problem.linear(tp, padding, tail, chunk_tokens)
    torch.testing.assert_close(our_loss.double(), loss, rtol=1e-5, atol=1e-5)
    assert relative_error(our_d_hidden, d_hidden) < 1e-5
    assert relative_error(our_d_weight, d_weight) < 1e-5


@both
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(temperature: float) -> None:
    problem = HeadProblem(temperature=temperature)
    loss, d_hidden, d_weight = problem.dense(torch.float64, "bucket")
    our_loss, our_d_hidden, our_d_weight = problem.linear(2, 1, chunk_tokens=7)
    torch.testing.assert_close(our_loss.double(), loss, rtol=1e-5, atol=2e-5)
    assert relative_error(our_d_hidden, d_hidden) < 1e-5
    assert relative_error(our_d_weight, d_weight) < 1e-5


@both
@pytest.mark.parametrize("chunk_tokens", [1, 7, 4096])
@pytest.mark.parametrize(("tp", "padding"), LAYOUTS)
def test_bfloat16_errs_no_more_than_torch(chunk_tokens: int, tp: int, padding: int) -> None:
    problem = HeadProblem(torch.bfloat16, tokens=96)
    expected = problem.dense(torch.float64, "bucket")
    for ours, torchs, true in zip(
        problem.linear(tp, padding, "bucket", chunk_tokens),
        problem.dense(torch.bfloat16, "bucket"),
        expected,
        strict=True,
    ):
        assert relative_error(ours, true) < 1.5 * relative_error(torchs, true)


@pytest.mark.parametrize("upstream", [0.25, -1 / 3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_scales_by_any_upstream_scalar(upstream: float, dtype: torch.dtype) -> None:
    problem = HeadProblem(dtype)
    _, *ones = problem.linear(1, 3, chunk_tokens=7)
    _, *scaled = problem.linear(1, 3, chunk_tokens=7, upstream=upstream)
    exact = upstream in (0.25, 0.0) or dtype == torch.float32
    for ours, one in zip(scaled, ones, strict=True):
        torch.testing.assert_close(ours, one * upstream, rtol=1e-6 if exact else 8e-3, atol=0)


def test_backward_twice_adds_up() -> None:
    problem = HeadProblem()
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    total = problem.losses(hidden, weight).total
    total.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    (2 * total).backward()
    torch.testing.assert_close(hidden.grad, 3 * once[0])
    torch.testing.assert_close(weight.grad, 3 * once[1])


@both
def test_it_is_the_loss_of_its_logits() -> None:
    problem = HeadProblem(torch.bfloat16)
    linear = problem.losses(problem.hidden, problem.weight, chunk_tokens=7)
    logits = problem.hidden @ problem.weight.T
    settings = {"kd_lambda": KD_LAMBDA, "tail": "bucket", "parallel": SINGLE, "valid": VOCAB}
    direct = ce_topk_kl(logits, *problem.labels(), **settings)
    for name in ("loss", "ce", "kd"):
        torch.testing.assert_close(getattr(linear, name), getattr(direct, name))


@both
@pytest.mark.parametrize(("tp", "padding"), LAYOUTS)
def test_no_tokens_give_zero_gradients(tp: int, padding: int) -> None:
    loss, d_hidden, d_weight = HeadProblem(torch.bfloat16, tokens=0).linear(tp, padding)
    assert loss.shape == (0,)
    assert d_hidden.shape == (0, HIDDEN) and d_weight.shape == (VOCAB, HIDDEN)
    assert not d_weight.any()


@pytest.mark.parametrize(("hidden_wants", "weight_wants"), [(True, False), (False, True), (False, False)])
def test_only_what_requires_a_gradient_gets_one(hidden_wants: bool, weight_wants: bool) -> None:
    problem = HeadProblem()
    _, d_hidden, d_weight = problem.dense(torch.float64, "bucket")
    hidden, weight = problem.hidden.requires_grad_(hidden_wants), problem.weight.requires_grad_(weight_wants)
    with Recorder() as recorder:
        total = problem.losses(hidden, weight, chunk_tokens=7).total
    assert recorder.products == 4 * (1 + hidden_wants + weight_wants)
    assert total.requires_grad == (hidden_wants or weight_wants)
    if total.requires_grad:
        total.backward()
    for ours, true in (
        (hidden.grad, d_hidden if hidden_wants else None),
        (weight.grad, d_weight if weight_wants else None),
    ):
        assert (ours is None) == (true is None)
        assert ours is None or relative_error(ours, true) < 1e-5


def test_without_gradients_only_the_projection_is_computed() -> None:
    problem = HeadProblem()
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    expected = problem.losses(hidden, weight).loss
    with torch.no_grad(), Recorder() as recorder:
        losses = problem.losses(hidden, weight, chunk_tokens=7)
    assert not losses.total.requires_grad
    assert recorder.products == 4
    torch.testing.assert_close(losses.loss, expected)


class Recorder(TorchDispatchMode):
    """Every tensor that an operation returns, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.returned: list[torch.Tensor] = []  # kept, so that no address is used twice
        self.products = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.products += operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        flat = result if isinstance(result, tuple | list) else [result]
        self.returned += [x for x in flat if isinstance(x, torch.Tensor)]
        return result


@both
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_exist_once_and_only_for_a_chunk(temperature: float, dtype: torch.dtype) -> None:
    """One buffer of [chunk, V] in the input's dtype, [CHUNK, V] in float32, and otherwise weights or hidden states."""
    tokens, chunk = 5 * CHUNK, 2 * CHUNK
    problem = HeadProblem(dtype, tokens=tokens, temperature=temperature)
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    with Recorder() as recorder:
        problem.losses(hidden, weight, chunk_tokens=chunk).total.backward()
    assert recorder.products == 3 * 3  # of three chunks: the projection and two gradients, none again in backward
    own = {x.untyped_storage().data_ptr() for x in (hidden, weight, hidden.grad, weight.grad)}
    gradients = (hidden.numel(), weight.numel())
    new = {}
    for x in recorder.returned:
        new[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size(), x.dtype
    assert own < new.keys()
    allocated = [of for address, of in new.items() if address not in own and of[0] not in gradients]
    assert [of for of in allocated if of[0] > CHUNK * VOCAB] == [(chunk * VOCAB, dtype)]


@both
@pytest.mark.parametrize(("temperature", "floats"), [(1.0, 4), (2.0, 5)])
def test_one_gather_of_a_few_floats_a_token_for_each_chunk(temperature: float, floats: int) -> None:
    sent: list[torch.Size] = []
    problem = HeadProblem(temperature=temperature)

    def work(parallel: Parallel) -> Any:
        weight, valid = problem.shard(parallel, 1)
        hidden = problem.hidden.clone().requires_grad_()
        problem.losses(hidden, weight, parallel, valid=valid, chunk_tokens=10).total.backward()

    on_ranks(2, work, sent)
    assert sent == [(floats, 10), (floats, 10), (floats, 4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": "other"}, "tail = 'other': must be none, bucket or renormalize"),
        ({"temperature": 0.0}, "temperature = 0.0: must be a positive finite number"),
        ({"chunk_tokens": 0}, "chunk_tokens = 0: must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    problem = HeadProblem()
    with pytest.raises(ValueError, match=message):
        problem.losses(problem.hidden, problem.weight, **change)


def test_ids_twice_are_refused() -> None:
    problem = HeadProblem()
    problem.ids[3, 1] = problem.ids[3, 0]
    with pytest.raises(ValueError, match="unique"):
        problem.losses(problem.hidden, problem.weight)


@both
@pytest.mark.parametrize("tail", TAILS)
def test_without_kd_the_loss_is_ce_whatever_the_kd_is(tail: str) -> None:
    """Here the teacher leaves mass outside its ids, and the ids are all there are: an infinite KD with a bucket."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator).requires_grad_() for n in (5, 4))
    targets = torch.tensor([0, 1, 2, 3, 0])
    ids = torch.arange(4).repeat(5, 1)
    logprobs, tail_mass = torch.full((5, 4), 0.2).log(), torch.full((5,), 0.2)
    settings = {"kd_lambda": 0.0, "tail": tail, "parallel": SINGLE, "valid": 4}
    losses = linear_ce_topk_kl(hidden, weight, targets, ids, logprobs, tail_mass, **settings)
    assert tail != "bucket" or bool(losses.kd.isinf().all())
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(losses.loss, expected.detach())
    got = torch.autograd.grad(losses.total, (hidden, weight))
    for ours, reference in zip(got, torch.autograd.grad(expected.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, reference)
