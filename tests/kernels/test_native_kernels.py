"""The fused operators against float64, for every instruction set of this machine; how they are loaded:
test_native_loading.py.

New tensors are filled with NaN before an operator writes to them, rows lie at odd addresses and strides, and padding
columns hold NaN: whatever is not written, or read where it must not be, shows.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from loss_problem import K, Problem, on_ranks, relative_error, shard_of

from megatron_npd.distributed.parallel import SINGLE, Parallel
from megatron_npd.kernels import native, token_logprobs, topk_logprobs

pytestmark = pytest.mark.skipif(not native.run_on("cpu"), reason="the fused operators are not built: see the log")

VOCABULARIES = (7, 32000, 49152, 151936, 153376, 76689)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIRST, TOP = 1000, 6
ops = torch.ops.megatron_npd


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch fills every new tensor with NaN (or the largest integer)."""
    torch.set_deterministic_debug_mode("error")
    assert torch.empty(3).isnan().all()
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine torch's threads spend most of their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def every_isa() -> Iterator[str]:
    """Uses one instruction set of this machine after the other."""
    best, names = ops.cpu_isa(""), []
    try:
        for name in ("scalar", "avx2", "avx512"):
            try:
                names.append(ops.cpu_isa(name))
            except ValueError as error:
                assert "this machine has no such instructions" in str(error)
                continue
            yield name
    finally:
        ops.cpu_isa(best)
    assert best == os.environ.get("NPD_CPU_ISA", names[-1]), "not the best one by default, nor the one asked for"


class Rows:
    """Awkward rows of logits, the first `FINITE` of them with a finite logsumexp, inside and outside S.

    `logits` is a view with padding; `z` are its valid columns in float64.
    """

    FINITE = 4

    def __init__(self, vocab: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(vocab)
        z = torch.randn(6, vocab, generator=generator) * 4
        z[1] += 500
        z[2] -= 500
        z[2, 4::2] = -torch.inf
        z[3, vocab // 3] = 60  # takes all but e⁻⁴⁰ of the mass
        z[4, vocab // 2] = torch.nan
        z[5] = -torch.inf
        self.vocab, self.dtype, self.columns = vocab, dtype, vocab + 3
        self.stride = self.columns + 1 + self.columns % 2  # odd
        buffer = torch.full((1 + len(z) * self.stride,), torch.nan, dtype=dtype)
        self.logits = buffer[1:].view(len(z), self.stride)[:, : self.columns]  # at an odd address
        self.logits[:, :vocab] = z.to(dtype)
        self.z = self.logits[:, :vocab].double()
        # Of this rank, and not: the last two would alias the first padding column and the last column.
        self.targets = FIRST + torch.tensor([0, vocab // 2, 3, vocab // 3, vocab, -1])
        # S: mostly neighbours (nothing between them to sum), the row's best in row 3, one id that another rank owns.
        self.ids = FIRST + torch.tensor([0, 1, 2, vocab - 1, vocab, 3]).repeat(len(z), 1)
        self.ids[3, 0] = FIRST + vocab // 3
        self.ids[3, 1:3] = FIRST - torch.tensor([1, 2])
        self.p = torch.rand(len(z), TOP, generator=generator) / TOP
        self.z_target, _ = self.at(self.targets[:, None])
        self.z_S, self.owns_S = self.at(self.ids)
        columns = torch.where(self.owns_S, self.ids - FIRST, vocab)
        self.in_S = torch.zeros(len(z), vocab + 1).bool().scatter_(1, columns, True)[:, :vocab]

    def at(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 logits at ids [T, n], 0 where another rank owns them, and which this rank owns."""
        own = (ids >= FIRST) & (ids < FIRST + self.vocab)
        return torch.where(own, self.z.gather(1, torch.where(own, ids - FIRST, 0)), 0.0), own

    def fresh_logits(self) -> torch.Tensor:
        """The finite rows, to be overwritten, in the same awkward place."""
        buffer = torch.empty(1 + len(self.z) * self.stride, dtype=self.dtype)[1:]
        copy = buffer.view(len(self.z), self.stride)[: self.FINITE, : self.columns]
        return copy.copy_(self.logits[: self.FINITE])


@pytest.fixture(scope="module", params=itertools.product(VOCABULARIES, DTYPES), ids=str)
def rows(request: pytest.FixtureRequest) -> Rows:
    return Rows(*request.param)


def assert_near(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Within tolerance · (1 + |expected|); infinities and NaN at the same places."""
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def largest_of(z: torch.Tensor) -> torch.Tensor:
    """The largest of each row, NaN apart."""
    return torch.where(z.isnan(), -torch.inf, z).amax(-1)


def sum_of(z: torch.Tensor, largest: torch.Tensor, temperature: float) -> torch.Tensor:
    """Σ exp((z - largest) / τ) of each row, which NaN reaches and -inf alone leaves at 0."""
    base = torch.where(largest == -torch.inf, 0.0, largest)
    return ((z - base[:, None]) / temperature).exp().sum(-1)


def test_score(rows: Rows) -> None:
    """NLL within 1e-6·(1 + |NLL|) of float64 over the same logits."""
    for temperature in (1.0, 0.7):
        largest = largest_of(rows.z)
        total = sum_of(rows.z, largest, temperature)
        nll = (largest - rows.z_target[:, 0]) / temperature + total.log()
        for _ in every_isa():
            ours = ops.score(rows.logits, rows.targets, None, FIRST, rows.vocab, 1 / temperature).double()
            assert torch.equal(ours[0], largest) and torch.equal(ours[2], rows.z_target[:, 0])
            torch.testing.assert_close(ours[1], total, rtol=1.5e-6, atol=0, equal_nan=True)
            assert_near((ours[0] - ours[2]) / temperature + ours[1].log(), nll)
        assert total[4].isnan() and largest[5] == -torch.inf and total[5] == 0


def test_topk(rows: Rows) -> None:
    k, vocab = 9, rows.vocab
    best, outside = [], rows.z.clone()
    for t, z in enumerate(rows.z):
        columns = torch.arange(vocab)[~z.isnan()]
        candidates = columns[z[columns] >= z[columns].topk(min(k, len(columns))).values[-1]]
        best.append(candidates[z[candidates].sort(descending=True, stable=True).indices][:k])
        outside[t, best[t]] = -torch.inf
    largest = largest_of(rows.z)
    rest = sum_of(outside, largest, 0.5)
    for _ in every_isa():
        our_values, our_ids, our_rest = ops.topk(rows.logits, k, FIRST, vocab, 2.0)
        assert torch.equal(our_rest[0].double(), largest)
        torch.testing.assert_close(our_rest[1].double(), rest, rtol=1.5e-6, atol=1e-37, equal_nan=True)
        for t, columns in enumerate(best):
            places = k - len(columns)
            assert our_ids[t].tolist() == [*(columns + FIRST).tolist(), *[FIRST] * places]
            assert our_values[t].tolist() == [*rows.z[t, columns].tolist(), *[-torch.inf] * places]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_statistics(rows: Rows, temperature: float) -> None:
    """What is outside S comes from the outside itself: right to 1e-6 where S holds all but e⁻⁴⁰ of the mass, too."""
    scaled = rows.z / temperature
    expected = [
        torch.where(rows.in_S, scaled, -torch.inf).logsumexp(-1),
        torch.where(rows.in_S, -torch.inf, scaled).logsumexp(-1),
        torch.where(rows.owns_S, rows.p * rows.z_S / temperature, 0.0).sum(-1),
        rows.z_target[:, 0],
    ]
    if temperature != 1:
        expected.append(rows.z.logsumexp(-1))
    for _ in every_isa():
        given = (rows.logits, rows.targets, rows.ids, rows.p, FIRST, rows.vocab, 1 / temperature)
        for got, wanted in zip(ops.loss_statistics(*given), expected, strict=True):
            assert_near(got, wanted)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_gradient(rows: Rows, temperature: float) -> None:
    """Not further from float64 than its rounding to the logits' dtype; at targets and S, to 5e-3 in bfloat16."""
    n = rows.FINITE
    z, in_S, targets, ids, p = rows.z[:n], rows.in_S[:n], rows.targets[:n], rows.ids[:n], rows.p[:n]
    lse, lse_one, one = (z / temperature).logsumexp(-1), z.logsumexp(-1), torch.ones(n)
    lse_tail = torch.where(in_S, -torch.inf, z / temperature).logsumexp(-1)
    numbers = [0.3 * one, lse_tail, 0.2 * one, lse_one, 0.9 * one, lse, 0.8 * one, 0.2 * one]
    coefficients = torch.stack([number.float() for number in numbers])
    tail, lse_tail, ce, lse_one, student, normaliser, teacher, target = coefficients.double()[:, :, None]
    expected = tail * (z / temperature - lse_tail).exp()
    if temperature != 1:
        expected += ce * (z - lse_one).exp()
    z_S, row, place = rows.z_S[:n], *rows.owns_S[:n].nonzero(as_tuple=True)
    inside = student * (z_S / temperature - normaliser).exp() - teacher * p + ce * (z_S - lse_one).exp()
    expected[row, ids[row, place] - FIRST] = inside[row, place]
    expected[torch.arange(n), targets - FIRST] -= target[:, 0]
    rounding = relative_error(expected.to(rows.dtype), expected)
    sparse = in_S.scatter(1, targets[:, None] - FIRST, True) & (expected.abs() > 1e-3)
    for _ in every_isa():
        logits = rows.fresh_logits()
        ops.loss_gradient_(logits, targets, ids, p, coefficients, FIRST, rows.vocab, 1 / temperature)
        assert not logits[:, rows.vocab :].any(), "padding has a gradient"
        ours = logits[:, : rows.vocab].double()
        assert relative_error(ours, expected) < 1.01 * rounding + 5e-7
        worst = ((ours - expected).abs() / expected.abs())[sparse].max()
        assert worst < {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[rows.dtype]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_public_functions_equal_float64_and_the_reference(tp: int, dtype: torch.dtype, temperature: float) -> None:
    """A vocabulary over ranks, the last of which owns little or nothing."""
    problem = Problem(dtype, tokens=20, temperature=temperature, vocab=4091)
    padding, log_q = 5, problem.logits.double().log_softmax(-1)
    loss, gradient = problem.reference(0.9, "bucket")
    top, ids = (problem.logits.double() / temperature).log_softmax(-1).sort(descending=True, stable=True)

    def work(parallel: Parallel) -> tuple:
        shard, valid = shard_of(problem.logits, parallel, padding)
        best = topk_logprobs(shard, K, parallel, valid, temperature)
        return token_logprobs(shard, problem.targets, parallel, valid), *best

    for mode in (nullcontext, native.disabled):
        with mode():
            our_loss, our_gradient = problem.ours(0.9, "bucket", tp, padding)
            for logprobs, our_ids, our_top, tail in on_ranks(tp, work):
                assert_near(logprobs, log_q.gather(1, problem.targets[:, None])[:, 0])
                assert mode is native.disabled or torch.equal(our_ids, ids[:, :K])  # torch's topk orders ties freely
                assert_near(our_top, top[:, :K])
                torch.testing.assert_close(tail.double(), top[:, K:].exp().sum(-1), rtol=2e-6, atol=0)
        assert_near(our_loss, loss, 1e-5)
        assert relative_error(our_gradient, gradient) < (1e-5 if dtype == torch.float32 else 2e-3)


def test_ids_among_equals_ascend_over_ranks() -> None:
    logits = torch.zeros(2, 16)
    logits[:, 11] = 1

    def work(parallel: Parallel) -> torch.Tensor:
        shard, valid = shard_of(logits, parallel, 0)
        return topk_logprobs(shard, 6, parallel, valid)[0]

    for tp in (1, 4):
        for ids in on_ranks(tp, work):
            assert ids.tolist() == [[11, 0, 1, 2, 3, 4]] * 2


def test_masked_rows_are_not_read() -> None:
    rows = Rows(32000, torch.bfloat16)
    everything = ops.score(rows.logits, rows.targets, None, FIRST, rows.vocab, 1.0)
    mask = torch.tensor([True, False] * 3)
    rows.logits[~mask] = torch.nan
    ours = ops.score(rows.logits, rows.targets, mask, FIRST, rows.vocab, 1.0)
    torch.testing.assert_close(ours[:, mask], everything[:, mask], rtol=0, atol=0, equal_nan=True)
    assert ours[:, ~mask].T.tolist() == [[-torch.inf, 0, 0]] * 3
    assert (
        ops.score(rows.logits, rows.targets, mask & False, FIRST, rows.vocab, 1.0).T.tolist()
        == [[-torch.inf, 0, 0]] * 6
    )


def test_a_shard_without_columns_and_no_rows() -> None:
    rows = Rows(7, torch.float32)
    given = (rows.targets, rows.ids, rows.p, FIRST, 0, 1.0)
    none = (torch.empty(0).long(), torch.empty(0, 2).long(), torch.empty(0, 2))
    for _ in every_isa():
        assert ops.score(rows.logits, rows.targets, None, FIRST, 0, 1.0).T.tolist() == [[-torch.inf, 0, 0]] * 6
        values, ids, rest = ops.topk(rows.logits, 2, FIRST, 0, 1.0)
        assert (values == -torch.inf).all() and (ids == FIRST).all() and rest.tolist() == [[-torch.inf] * 6, [0.0] * 6]
        assert ops.loss_statistics(rows.logits, *given).T.tolist() == [[-torch.inf, -torch.inf, 0, 0]] * 6
        logits = torch.empty(0, 7)
        assert ops.score(logits, none[0], None, 0, 7, 1.0).shape == (3, 0)
        assert [x.shape for x in ops.topk(logits, 2, 0, 7, 1.0)] == [(0, 2), (0, 2), (2, 0)]
        assert ops.loss_statistics(logits, *none, 0, 7, 0.5).shape == (5, 0)
        ops.loss_gradient_(logits, *none, torch.empty(8, 0), 0, 7, 1.0)


def test_the_same_bits_on_every_run_and_number_of_threads() -> None:
    logits = (torch.randn(33, 32003) * 4).bfloat16()
    targets, ids, p = torch.arange(33), torch.arange(33 * TOP).view(33, TOP), torch.rand(33, TOP)
    coefficients = torch.rand(8, 33)

    def everything() -> list[torch.Tensor]:
        gradient = logits.clone()
        ops.loss_gradient_(gradient, targets, ids, p, coefficients, 0, 32000, 0.5)
        statistics = ops.loss_statistics(logits, targets, ids, p, 0, 32000, 0.5)
        score = ops.score(logits, targets, None, 0, 32000, 1.0)
        return [gradient, statistics, score, *ops.topk(logits, 9, 0, 32000, 0.5)]

    try:
        for _ in every_isa():
            first, *others = [(torch.set_num_threads(n), everything())[1] for n in (1, 1, 2, 4)]
            assert all(torch.equal(a, b) for other in others for a, b in zip(other, first, strict=True))
    finally:
        torch.set_num_threads(1)


def test_rows_beyond_two_billion_elements(tmp_path: Path) -> None:
    """A sparse file, of which only the three rows exist."""
    stride, vocab = 2**30 + 1, 32000
    path = tmp_path / "logits"
    with path.open("wb") as file:
        file.truncate(2 * (2 * stride + vocab))
    far = torch.from_file(str(path), shared=True, size=2 * stride + vocab, dtype=torch.bfloat16)
    far = far.as_strided((3, vocab), (stride, 1))
    far.copy_(torch.randn(3, vocab) * 4)
    near, targets, ids = far.clone(), torch.arange(3), torch.arange(18).view(3, 6)
    p, coefficients = torch.rand(3, 6), torch.rand(8, 3)
    calls: list[Callable] = [
        lambda x: [ops.score(x, targets, None, 0, vocab, 1.0)],
        lambda x: ops.topk(x, 6, 0, vocab, 1.0),
        lambda x: [ops.loss_statistics(x, targets, ids, p, 0, vocab, 1.0)],
        lambda x: [ops.loss_gradient_(x, targets, ids, p, coefficients, 0, vocab, 1.0), x][1:],
    ]
    for call in calls:
        assert all(torch.equal(a, b) for a, b in zip(call(far), call(near), strict=True))


def test_bad_arguments_are_refused() -> None:
    logits, targets = torch.zeros(2, 8), torch.zeros(2).long()
    for wrong, message in (
        ((logits, targets, None, 0, 9, 1.0), "at most 8 columns"),
        ((logits.double(), targets, None, 0, 8, 1.0), "must be float32, bfloat16 or float16"),
        ((logits.T, targets, None, 0, 2, 1.0), "inner stride 1"),
        ((logits, targets[:1], None, 0, 8, 1.0), "targets: wrong shape"),
        ((logits, targets.int(), None, 0, 8, 1.0), "targets: wrong dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.score(*wrong)


@pytest.mark.parametrize("logits", [torch.randn(4, 9).double(), torch.randn(9, 4).T], ids=["float64", "transposed"])
def test_what_the_operators_do_not_take_goes_to_the_reference(logits: torch.Tensor) -> None:
    assert not native.runs(logits) and native.runs(logits.float().contiguous())
    targets = torch.arange(4)
    expected = logits.double().log_softmax(-1)[targets, targets]
    assert_near(token_logprobs(logits, targets, SINGLE, 9), expected)
