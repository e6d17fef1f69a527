"""Short sequences attended to together give what each gives by itself, in values and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_npd.mcore.attention import LENGTHS_ON_CPU, SHORT, ReferenceAttention, _batches
from megatron_npd.mcore.packed import LocalSequences

pytestmark = pytest.mark.heavy  # Megatron

D = 32


def attended(lengths: list[int], heads: int, groups: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], int]:
    """[output, gradients of query, key and value] of random packed sequences, and the calls it took."""
    generator = torch.Generator().manual_seed(3)
    total = sum(lengths)
    inputs = [
        torch.randn(total, count, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]
    bounds = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
    calls = []
    plain = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or plain(*a, **k)
        )
        module = SimpleNamespace(softmax_scale=D**-0.5)
        for name in ("_attend_one", "_attend_padded"):
            setattr(module, name, getattr(ReferenceAttention, name).__get__(module))
        out = ReferenceAttention.attend(module, *inputs, LocalSequences(bounds, bounds, max(lengths), max(lengths)))
    (out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)], len(calls)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 2)])
def test_together_as_one_by_one(heads: int, groups: int) -> None:
    lengths = [13, SHORT + 1, 26, 1, 32, 33, 64, 20, SHORT, 5, 40, 700]
    (ours, calls), (exact, alone) = (
        attended(lengths, heads, groups, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert alone == len(lengths), "float64 goes one by one"
    assert calls == 2 + 3, "lengths up to 32 and up to 64 together, the three others by themselves"
    for mine, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=2e-5, atol=2e-6)


def test_in_16_bit_each_goes_by_itself() -> None:
    assert attended([13, 20, 5], 2, 2, torch.bfloat16)[1] == 3


def test_only_whole_short_sequences_go_together() -> None:
    whole = [(0, 10), (10, 20), (20, 20 + SHORT + 1), (300, 340)]
    assert _batches(whole, whole) == {LENGTHS_ON_CPU: [0, 1]}
    keys = [(0, 10), (10, 30), (30, 31 + SHORT), (400, 440)]  # of context parallelism: more keys than queries
    assert _batches(whole, keys) == {}
