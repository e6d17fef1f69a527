"""The CUDA kernels, run thread for thread on the host (csrc/emulation.cpp), against float64.

The library is compiled from the sources of the device kernels. What it cannot show is their speed and what nvcc makes
of them (test_cuda_compiles.py). Its exponential errs as much as the device's may, shared memory starts as NaN, results
start as poison, and every call runs with the threads in both orders between barriers (cuda_emulation.py).
"""

from __future__ import annotations

import math
import mmap
import shutil

import pytest
import torch
from cuda_emulation import DTYPES, Emulation, build
from loss_problem import TAILS, Problem

from megatron_npd.kernels import native

pytestmark = pytest.mark.slow  # building the emulation alone takes ten seconds
VOCABULARIES = [7, 300, 32000, 49152, 76689, 153376]
CASES = [(vocab, dtype) for vocab in VOCABULARIES for dtype in DTYPES]
LAYOUTS = {7: 2, 300: 8, 32000: 4, 49152: 8, 76689: 2, 153376: 8}
"""Tensor-parallel size that a vocabulary is tried at, besides 1."""
HUGE = 3e4
"""Of padding and of the memory around the logits: would swallow every softmax."""
K = 10


@pytest.fixture(scope="session")
def emulation(pytestconfig):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulation with")
    return Emulation(build(pytestconfig.cache.mkdir("cuda_emulation")))


@pytest.fixture(autouse=True)
def one_thread():
    """References are small: a second thread would only wait for the first, busily."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_logits(rows, vocab, dtype, offset=0.0, scale=3.0, seed=0):
    """Float64 [rows, vocab] of values that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * scale + offset).to(dtype).double()


def placed(z, dtype, columns=None, stride_beyond=3, misaligned_by=1):
    """Logits in memory as a kernel may find them: an odd stride, no alignment, padding and surroundings huge."""
    rows, vocab = z.shape
    columns = columns or vocab
    stride = columns + stride_beyond
    memory = torch.full((misaligned_by + rows * stride + 16,), HUGE, dtype=dtype)
    view = memory.as_strided((rows, columns), (stride, 1), misaligned_by)
    view[:, :vocab] = z.to(dtype)
    return view


def shards(z, dtype, size):
    """(logits, first, valid) of each of `size` ranks; the vocabulary is padded to a multiple of 2 * size columns."""
    columns = -(-z.shape[1] // (2 * size)) * 2
    for rank in range(size):
        valid = min(max(z.shape[1] - rank * columns, 0), columns)
        yield placed(z[:, rank * columns : rank * columns + valid], dtype, columns), rank * columns, valid


def first_columns(vocab, size):
    return [rank * (-(-vocab // (2 * size)) * 2) for rank in range(size)]


def logsumexp_of(maximum, total, inverse_temperature=1.0):
    """float64, over the ranks in dimension 0."""
    return torch.logsumexp(maximum.double() * inverse_temperature + total.double().log(), 0)


def sampled(z, seed=0):
    """Targets: the best token, the first column, the last and random ones."""
    targets = torch.randint(0, z.shape[1], (len(z),), generator=torch.Generator().manual_seed(seed))
    targets[0], targets[-1] = z[0].argmax(), 0
    return targets


# ---- score ---------------------------------------------------------------------------------------------------------


def nll_of(emulation, z, dtype, size, splits=1, inverse_temperature=1.0):
    targets = sampled(z)
    parts = [
        emulation.score(logits, targets, None, first, valid, inverse_temperature, splits)
        for logits, first, valid in shards(z, dtype, size)
    ]
    maximum, total, target = torch.stack(parts, 1)
    scaled = z * inverse_temperature
    got = logsumexp_of(maximum, total, inverse_temperature) - target.double().sum(0) * inverse_temperature
    return got, scaled.logsumexp(-1) - scaled.gather(1, targets[:, None])[:, 0]


def assert_nll(got, want):
    assert ((got - want).abs() <= 1e-6 * (1 + want.abs())).all(), (got, want)


@pytest.mark.parametrize(("vocab", "dtype"), CASES)
def test_score(emulation, vocab, dtype):
    for size, offset, splits in ((1, 0, 1), (1, 500, 5), (LAYOUTS[vocab], -500, 1), (LAYOUTS[vocab], 0, 2)):
        assert_nll(*nll_of(emulation, random_logits(2, vocab, dtype, offset), dtype, size, splits))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_score_of_every_layout_and_temperature(emulation, size):
    for temperature in (0.7, 2.5):
        z = random_logits(3, 19173, torch.bfloat16, offset=100)
        assert_nll(*nll_of(emulation, z, torch.bfloat16, size, inverse_temperature=1 / temperature))


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_at_every_alignment(emulation, dtype):
    """Heads and tails of every length, and rows that are nothing else."""
    for vocab in (1, 5, 16, 41):
        z = random_logits(9, vocab, dtype)
        targets = sampled(z)
        for misaligned_by in range(8):
            logits = placed(z, dtype, stride_beyond=misaligned_by % 3, misaligned_by=misaligned_by)
            maximum, total, target = emulation.score(logits[:2], targets[:2])
            assert torch.equal(maximum.double(), z[:2].amax(1))
            assert torch.equal(target.double(), z.gather(1, targets[:, None])[:2, 0])
            torch.testing.assert_close(
                total.double(), (z - z.amax(1, keepdim=True)).exp().sum(1)[:2], rtol=1e-6, atol=0
            )


def test_score_reads_no_masked_row(emulation):
    z = random_logits(4, 5000, torch.float32)
    z[1::2] = math.nan
    mask = torch.tensor([True, False, True, False])
    for splits in (1, 2):
        result = emulation.score(placed(z, torch.float32), torch.zeros(4, dtype=torch.int64), mask, splits=splits)
        assert torch.equal(result[:, 1], torch.tensor([-math.inf, 0, 0]))
        assert torch.equal(result[:, 1], result[:, 3])
        assert result[:, ::2].isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
def test_score_of_infinities_and_nan(emulation, splits):
    """Nothing but -inf, one finite logit among them, a NaN in a vector, in the head, and nothing but NaN."""
    z = torch.zeros(5, 70000, dtype=torch.float64)
    z[:2] = -math.inf
    z[1, 40001] = 2.5
    z[2, 50000] = z[3, 0] = z[4] = math.nan
    for dtype in DTYPES:
        m, total, target = emulation.score(
            placed(z, dtype), torch.tensor([0, 40001, 1, 1, 1]), splits=splits, first=0, valid=70000
        )
        assert (m[0], total[0], target[0]) == (-math.inf, 0, -math.inf)
        assert (m[1], total[1], target[1]) == (2.5, pytest.approx(1), 2.5)
        assert total[2:].isnan().all() and m[2] == m[3] == 0


def test_score_of_a_rank_without_columns(emulation):
    logits = placed(torch.zeros(2, 0, dtype=torch.float64), torch.bfloat16, columns=24)
    result = emulation.score(logits, torch.tensor([48, 60]), first=48, valid=0)
    assert torch.equal(result, torch.tensor([[-math.inf] * 2, [0.0] * 2, [0.0] * 2]))


def test_ids_of_other_ranks_alias_nothing(emulation):
    z = random_logits(6, 32, torch.float32)
    targets = torch.tensor([31, 32, 63, 64, -1, -(2**63)])
    target = emulation.score(placed(z, torch.float32, columns=34), targets, first=32, valid=32)[2]
    assert torch.equal(target.double(), torch.stack([z[0, 0] * 0, z[1, 0], z[2, 31], *(z[3:, 0] * 0)]))


def test_rows_beyond_two_to_the_32_elements(emulation):
    """The memory is mapped and not reserved (0x4000): only the three rows are touched."""
    stride, vocab = 2**31 + 8, 300
    memory = mmap.mmap(-1, 2 * (2 * stride + vocab), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    logits = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((3, vocab), (stride, 1))
    z = random_logits(3, vocab, torch.bfloat16)
    logits.copy_(z)
    result = emulation.score(logits, torch.tensor([1, 2, 3]))
    assert torch.equal(result[0].double(), z.amax(1))
    assert torch.equal(emulation.topk(logits, 3)[0].double(), z.topk(3).values)


def test_rows_are_split_only_where_there_are_few(emulation):
    assert emulation.splits(4096, 153376, 8, 132) == 1
    assert emulation.splits(1, 153376, 8, 132) == 9  # a whole round each
    assert emulation.splits(100, 153376, 8, 132) == 6
    assert emulation.splits(1, 300, 8, 132) == emulation.splits(1, 0, 8, 132) == 1


# ---- topk ----------------------------------------------------------------------------------------------------------


def best(z, k):
    """Values and ids, the lowest id first among equals."""
    values, ids = torch.sort(z, dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def assert_topk(got, z, k, first=0, inverse_temperature=1.0):
    values, ids, (maximum, rest) = got
    want_values, want_ids = best(z, k)
    held = want_values.shape[1]
    assert torch.equal(values[:, :held].double(), want_values)
    assert torch.equal(ids[:, :held], want_ids + first)
    assert (values[:, held:] == -math.inf).all() and (ids[:, held:] == first).all()
    assert torch.equal(maximum.double(), want_values[:, 0])
    finite = want_values[:, :1].nan_to_num(neginf=0.0)
    outside = z.scatter(1, want_ids, -math.inf)
    want = ((outside - finite) * inverse_temperature).exp().sum(1)
    torch.testing.assert_close(rest.double(), want, rtol=3e-6, atol=1e-37)


@pytest.mark.parametrize(("vocab", "dtype"), CASES)
def test_topk(emulation, vocab, dtype):
    z = random_logits(2, vocab, dtype)
    assert_topk(emulation.topk(placed(z, dtype), K), z, K)
    z += 500
    z = z.to(dtype).double()
    got = emulation.topk(placed(z, dtype, vocab + 5), 64, valid=vocab, inverse_temperature=0.4)
    assert_topk(got, z, 64, inverse_temperature=0.4)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_topk_of_ranks_merges(emulation, size):
    z = random_logits(2, 19173, torch.bfloat16)
    parts = [emulation.topk(logits, K, first, valid) for logits, first, valid in shards(z, torch.bfloat16, size)]
    values, ids, rest = (torch.stack(part) for part in zip(*parts, strict=True))
    candidates, order = values.permute(1, 0, 2).flatten(1).double().sort(descending=True, stable=True)
    want_values, want_ids = best(z, K)
    assert torch.equal(candidates[:, :K], want_values)
    assert torch.equal(ids.permute(1, 0, 2).flatten(1).gather(1, order)[:, :K], want_ids)
    lse = torch.logaddexp(logsumexp_of(*rest.unbind(1)), candidates.logsumexp(1))
    torch.testing.assert_close(lse, z.logsumexp(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [1, 10, 33, 64])
def test_topk_of_hard_rows(emulation, k):
    """Equal logits, ascending and descending ones, the best all in one warp's columns, few that are not -inf."""
    vocab = 20000
    z = torch.empty(6, vocab, dtype=torch.float64)
    z[0] = 1.5
    z[1] = torch.arange(vocab) / 100
    z[2] = -z[1]
    z[3] = random_logits(1, vocab, torch.float32)[0].clamp(max=3)
    z[3, 8 : 8 + 96] += 50  # neighbours, in a few lanes of one warp
    z[4] = -math.inf
    z[4, [3, 777, 19999]] = torch.tensor([1.0, 2.0, 3.0]).double()
    z[5] = -math.inf
    z = z.float().double()
    assert_topk(emulation.topk(placed(z, torch.float32), k), z, k)


def test_topk_beyond_the_columns(emulation):
    for valid in (1, 5, 9, 40):
        z = random_logits(2, valid, torch.bfloat16)
        got = emulation.topk(placed(z, torch.bfloat16, columns=64), 64, first=128, valid=valid)
        assert_topk(got, z, 64, first=128)
    values, ids, rest = emulation.topk(placed(z, torch.bfloat16), 4, first=128, valid=0)
    assert (values == -math.inf).all() and (ids == 128).all()
    assert torch.equal(rest, torch.tensor([[-math.inf] * 2, [0.0] * 2]))


def test_topk_shows_nan_in_the_rest(emulation):
    z = random_logits(2, 9000, torch.float32)
    z[0, 4321] = math.nan
    _, ids, rest = emulation.topk(placed(z, torch.float32), K)
    assert rest[1, 0].isnan() and rest[1, 1].isfinite()
    assert 4321 not in ids[0]


def test_minus_zero_equals_zero(emulation):
    z = torch.full((1, 600), -0.0, dtype=torch.float64)
    z[0, 300:] = 0.0
    values, ids, _ = emulation.topk(placed(z, torch.float32), 3)
    assert ids.tolist() == [[0, 1, 2]] and values.tolist() == [[0, 0, 0]]


# ---- loss_statistics and loss_gradient_ ----------------------------------------------------------------------------


class Labels:
    """Targets in and outside S; S holds the student's best, column 0 of every rank and random ids."""

    def __init__(self, z, size=1, k=K, seed=1):
        rows, vocab = z.shape
        generator = torch.Generator().manual_seed(seed)
        k = min(k, vocab - 1)
        order = torch.rand(rows, vocab, generator=generator)
        wanted = torch.tensor([id for id in first_columns(vocab, size) if id < vocab][: max(1, k - 2)])
        order[:, wanted] += 2
        order.scatter_(1, z.topk(min(2, k - len(wanted)) if k > len(wanted) else 1).indices, 4.0)
        self.ids = order.topk(k).indices
        self.p = (torch.rand(rows, k, generator=generator) / k).float()
        self.targets = torch.randint(0, vocab, (rows,), generator=generator)
        self.targets[::2] = self.ids[::2, -1]
        self.inside = torch.zeros_like(z, dtype=torch.bool).scatter_(1, self.ids, True)

    def __iter__(self):
        return iter((self.targets, self.ids, self.p))


def statistics_of(z, labels, inverse_temperature):
    """[4 or 5, rows] in float64, over the whole vocabulary."""
    scaled = z * inverse_temperature
    rows = [
        scaled.masked_fill(~labels.inside, -math.inf).logsumexp(1),
        scaled.masked_fill(labels.inside, -math.inf).logsumexp(1),
        (labels.p * scaled.gather(1, labels.ids)).sum(1),
        z.gather(1, labels.targets[:, None])[:, 0],
    ]
    return torch.stack(rows if inverse_temperature == 1 else [*rows, z.logsumexp(1)])


def merged_statistics(emulation, z, dtype, labels, size, inverse_temperature, splits):
    parts = torch.stack(
        [
            emulation.loss_statistics(logits, *labels, first, valid, inverse_temperature, splits)
            for logits, first, valid in shards(z, dtype, size)
        ]
    ).double()
    summed = parts.sum(0)
    lse = parts.logsumexp(0)
    return torch.stack([lse[0], lse[1], summed[2], summed[3], *lse[4:]])


@pytest.mark.parametrize(("vocab", "dtype"), CASES)
def test_loss_statistics(emulation, vocab, dtype):
    layouts = ((1, 0, 1.0, 1), (1, 500, 0.4, 3), (LAYOUTS[vocab], -500, 1.0, 2), (LAYOUTS[vocab], 0, 0.4, 1))
    for size, offset, inverse_temperature, splits in layouts:
        z = random_logits(2, vocab, dtype, offset)
        labels = Labels(z, size)
        got = merged_statistics(emulation, z, dtype, labels, size, inverse_temperature, splits)
        torch.testing.assert_close(got, statistics_of(z, labels, inverse_temperature), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_outside_keeps_its_digits_where_S_holds_nearly_all_mass(emulation, dtype):
    z = random_logits(2, 9000, dtype, scale=1.0)
    labels = Labels(z, k=64)
    z = z.scatter_add(1, labels.ids, torch.full_like(labels.ids, 60, dtype=torch.float64)).to(dtype).double()
    got = emulation.loss_statistics(placed(z, dtype), *labels).double()
    torch.testing.assert_close(got[1], statistics_of(z, labels, 1.0)[1], rtol=1e-6, atol=0)


def test_S_may_be_everything_or_nothing(emulation):
    z = random_logits(2, 20, torch.float32)
    everything = torch.arange(20).repeat(2, 1)
    targets = torch.tensor([3, 19])
    logits = placed(z, torch.float32)
    inside, outside, _, _ = emulation.loss_statistics(logits, targets, everything, torch.rand(2, 20))
    torch.testing.assert_close(inside.double(), z.logsumexp(1), rtol=1e-6, atol=0)
    assert (outside == -math.inf).all()
    inside, outside, pz, _ = emulation.loss_statistics(logits, targets, everything[:, :0], torch.rand(2, 0))
    torch.testing.assert_close(outside.double(), z.logsumexp(1), rtol=1e-6, atol=0)
    assert (inside == -math.inf).all() and (pz == 0).all()


def test_statistics_show_nan_and_survive_infinities(emulation):
    z = random_logits(3, 3000, torch.float32)
    labels = Labels(z)
    outside = (~labels.inside[0]).nonzero()[:, 0]
    z[0, outside[1234]] = math.nan
    z[1, labels.ids[1, 0]] = math.nan
    z[2] = z[2].masked_fill(~labels.inside[2], -math.inf)
    for inverse_temperature in (1.0, 0.5):
        got = emulation.loss_statistics(placed(z, torch.float32), *labels, inverse_temperature=inverse_temperature)
        assert got[1, 0].isnan() and got[0, 0].isfinite()
        assert got[0, 1].isnan() and got[2, 1].isnan() and got[1, 1].isfinite()
        assert got[1, 2] == -math.inf and got[0, 2].isfinite()
        assert inverse_temperature == 1 or (got[4, :2].isnan().all() and got[4, 2].isfinite())


def coefficients_of(z, labels, inverse_temperature):
    """Float32 [8, rows] as a bucket objective with kd_lambda = 0.7 has them, with a gradient of its own per row."""
    inside, outside, *rest = statistics_of(z, labels, inverse_temperature)
    lse = torch.logaddexp(inside, outside)
    lse_one = rest[2] if inverse_temperature != 1 else lse
    grad = torch.rand(len(z), generator=torch.Generator().manual_seed(2)).double() + 0.5
    kd, ce = 0.7 * grad, 0.3 * grad
    tail = kd * ((outside - lse).exp() - (1 - labels.p.sum(1)))
    if inverse_temperature == 1:
        tail = tail + ce * (outside - lse).exp()
    return torch.stack([tail, outside, ce, lse_one, kd, lse, kd, ce]).float()


def gradient_of(z, labels, coefficients, inverse_temperature):
    """The operator's definition in float64."""
    tail, lse_tail, ce, lse_one, student, normaliser, teacher, target = coefficients.double()[:, :, None]
    scaled, softmax = z * inverse_temperature, ce * (z - lse_one).exp()
    outside = torch.where(tail == 0, 0.0, tail * (scaled - lse_tail).exp())
    if inverse_temperature != 1:
        outside = outside + softmax
    p = torch.zeros_like(z).scatter_(1, labels.ids, labels.p.double())
    inside = student * (scaled - normaliser).exp() - teacher * p + softmax
    gradient = torch.where(labels.inside, inside, outside)
    return gradient.scatter_add(1, labels.targets[:, None], -target)


def check_gradient(emulation, z, dtype, labels, coefficients, size, inverse_temperature, splits):
    """Within 2e-3 of the norm of the ideal gradient once rounded, and 5e-3 at every entry of S and the target."""
    want = gradient_of(z, labels, coefficients, inverse_temperature)
    norm, entry = (2e-6, 5e-6) if dtype == torch.float32 else (2e-3, 5e-3)
    # log2(e) / temperature in float32 times a logit, against log2(e) times a float32 logsumexp.
    relative = 1.2e-7 * z.abs().max().item() * inverse_temperature
    smallest = torch.finfo(dtype).smallest_normal
    got = []
    for logits, first, valid in shards(z, dtype, size):
        before = logits.as_strided((logits.untyped_storage().nbytes() // logits.element_size(),), (1,), 0).clone()
        emulation.loss_gradient_(logits, *labels, coefficients, first, valid, inverse_temperature, splits)
        got.append(logits[:, :valid].double())
        assert torch.equal(logits[:, valid:], torch.zeros_like(logits[:, valid:])), "padding"
        after = logits.as_strided(before.shape, (1,), 0).clone()
        for memory in (before, after):
            memory.as_strided(logits.shape, logits.stride(), logits.storage_offset()).zero_()
        assert torch.equal(before, after), "something beside the rows was written"
    got = torch.cat(got, 1)
    beyond_rounding = (got - want.to(dtype).double()).norm(dim=1)
    assert (beyond_rounding <= (norm + relative) * want.norm(dim=1) + smallest).all()
    # Entries of S and the target, also where the two parts of them nearly cancel: their scale counts then.
    special = torch.cat([labels.ids, labels.targets[:, None]], 1)
    error, size_of_entry = (got - want).abs().gather(1, special), want.abs().gather(1, special)
    scale = coefficients[[4, 6, 7]].double().abs().amax(0)[:, None]
    assert (error <= entry * size_of_entry + (1e-6 + relative) * scale + smallest).all()


@pytest.mark.parametrize(("vocab", "dtype"), CASES)
def test_loss_gradient(emulation, vocab, dtype):
    layouts = ((1, 0, 1.0, 1), (1, 500, 0.4, 3), (LAYOUTS[vocab], -500, 1.0, 2), (LAYOUTS[vocab], 0, 0.4, 1))
    for size, offset, inverse_temperature, splits in layouts:
        z = random_logits(2, vocab, dtype, offset)
        labels = Labels(z, size)
        coefficients = coefficients_of(z, labels, inverse_temperature)
        check_gradient(emulation, z, dtype, labels, coefficients, size, inverse_temperature, splits)


@pytest.mark.parametrize("inverse_temperature", [1.0, 0.5])
def test_nothing_outside_S_is_no_nan(emulation, inverse_temperature):
    """A factor of 0 beside a logsumexp of -inf, and CE alone or KD alone."""
    z = random_logits(3, 400, torch.float32)
    labels = Labels(z, k=64)
    coefficients = coefficients_of(z, labels, inverse_temperature)
    coefficients[0] = 0
    coefficients[1] = -math.inf
    coefficients[2, 1] = coefficients[7, 1] = 0
    coefficients[4, 2] = coefficients[6, 2] = 0
    check_gradient(emulation, z, torch.float32, labels, coefficients, 1, inverse_temperature, 1)


def test_gradient_with_as_many_ids_as_threads_and_with_none(emulation):
    z = random_logits(2, 5000, torch.bfloat16)
    for k in (512, 1):
        labels = Labels(z, k=k)
        check_gradient(emulation, z, torch.bfloat16, labels, coefficients_of(z, labels, 1.0), 1, 1.0, 2)
    labels.ids, labels.p, labels.inside = labels.ids[:, :0], labels.p[:, :0], labels.inside & False
    coefficients = coefficients_of(z, labels, 1.0)
    check_gradient(emulation, z, torch.bfloat16, labels, coefficients, 1, 1.0, 1)


# ---- Behind the public functions -----------------------------------------------------------------------------------


@pytest.fixture
def behind_the_functions(emulation, monkeypatch):
    """`megatron_npd.kernels` on CPU tensors computes with the CUDA kernels."""

    def inverse(operator):
        return lambda *given: operator(*given[:-1], inverse_temperature=1 / given[-1])

    monkeypatch.setattr(native, "runs", lambda *_: True)
    monkeypatch.setattr(native, "run_on", lambda device: True)
    monkeypatch.setattr(
        native, "score", lambda z, y, first, valid: emulation.score(z, y.contiguous(), None, first, valid)
    )
    monkeypatch.setattr(native, "topk", inverse(emulation.topk))
    monkeypatch.setattr(native, "loss_statistics", inverse(emulation.loss_statistics))
    monkeypatch.setattr(
        native,
        "loss_gradient_",
        lambda z, y, ids, p, c, first, valid, temperature: emulation.loss_gradient_(
            z, y, ids, p, c.contiguous(), first, valid, 1 / temperature
        ),
    )


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("tp", "temperature"), [(1, 2.0), (4, 1.0)])
def test_the_loss_of_the_paper(behind_the_functions, tail, tp, temperature):
    """Loss and gradient against autograd through the definition, over real ranks."""
    problem = Problem(tokens=8, temperature=temperature)
    loss, gradient = problem.ours(0.7, tail, tp, padding=3)
    want_loss, want_gradient = problem.reference(0.7, tail)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=1e-4, atol=1e-6)
