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


def random_inputs(total: int, heads: int, groups: int) -> list[torch.Tensor]:
    """Query, key and value, [T, heads, D], float64."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(total, count, D, generator=generator, dtype=torch.float64) for count in (heads, groups, groups)]


def attend(inputs: list[torch.Tensor], lengths: list[int]) -> tuple[torch.Tensor, int]:
    """The output for sequences of these lengths, one after another, and the calls it took."""
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
    return out, len(calls)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 2)])
def test_together_as_one_by_one(heads: int, groups: int) -> None:
    lengths = [13, SHORT + 1, 26, 1, 32, 33, 64, 20, SHORT, 5, 40, 700]
    results, calls = [], []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in random_inputs(sum(lengths), heads, groups)]
        out, made = attend(inputs, lengths)
        (out * random_inputs(sum(lengths), heads, groups)[0]).sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
        calls.append(made)
    assert calls == [3 + 2, len(lengths)], "up to 32, up to 64, SHORT; two by themselves; float64 one by one"
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-6)


def test_what_a_sequence_gives_does_not_depend_on_the_others() -> None:
    lengths = [13, 26, 40, 7]
    inputs = [x.float() for x in random_inputs(sum(lengths), 4, 2)]
    together, start = attend(inputs, lengths)[0], 0
    for length in lengths:
        alone = attend([x[start : start + length] for x in inputs], [length])[0]
        assert torch.equal(together[start : start + length], alone)
        start += length


def test_in_16_bit_each_goes_by_itself() -> None:
    lengths = [13, 20, 5]
    assert attend([x.bfloat16() for x in random_inputs(sum(lengths), 2, 2)], lengths)[1] == 3


def test_only_whole_short_sequences_go_together() -> None:
    whole = [(0, 10), (10, 20), (20, 20 + SHORT + 1), (300, 340)]
    assert _batches(whole, whole) == {LENGTHS_ON_CPU: [0, 1], 2 * LENGTHS_ON_CPU: [3]}
    keys = [(0, 11), (10, 30), (30, 31 + SHORT), (400, 440)]  # of context parallelism: more keys than queries
    assert _batches(whole, keys) == {}
