"""Runs of a flattened tensor as blocks: all elements, once each, where they belong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from megatron_npd.mcore.flat_blocks import Shape, blocks, stored_blocks


@st.composite
def runs(draw: st.DrawFn) -> tuple[Shape, int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    cuts = st.integers(0, math.prod(shape))
    start, stop = sorted((draw(cuts), draw(cuts)))
    return shape, start, stop


@given(runs())
def test_blocks_are_the_run_in_its_order(run: tuple[Shape, int, int]) -> None:
    shape, start, stop = run
    whole = torch.arange(math.prod(shape)).view(shape)
    found = list(blocks(shape, start, stop))
    elements = [whole[tuple(slice(a, a + n) for a, n in zip(offset, block, strict=True))] for offset, block in found]
    assert all(element.numel() for element in elements)
    assert all(element.is_contiguous() for element in elements), "or the optimizer's state would have to be copied"
    assert [int(number) for element in elements for number in element.flatten()] == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 7, 24, 25, 47, 48])
def test_two_ranks_store_a_parameter_at_its_place(layer: int | None, halves: bool, cut: int) -> None:
    """A second tensor-parallel rank's [8, 6] of [16, 6], perhaps one of 4 layers, perhaps SwiGLU's two halves."""
    values = torch.arange(48.0).view(8, 6)
    layers = [] if layer is None else [(0, layer, 4)]
    lead = len(layers)
    described = ShardedTensor.from_rank_offsets("key", values, *layers, (lead, 1, 2), prepend_axis_num=lead)
    stored = apply_swiglu_sharded_factory(described, layers) if halves else described
    whole = torch.full(described.global_shape, -1.0)
    for start, stop in ((0, cut), (cut, 48)):
        held = values.flatten()[start:stop].clone()
        for piece in stored_blocks(stored, values.shape, start, stop):
            block = piece.holding(held, start, "optimizer.key")
            assert block.key == "optimizer.key" and block.data.untyped_storage().data_ptr() == held.data_ptr()
            place = whole[block.global_slice()]
            assert (place == -1).all(), "once"
            place.copy_(block.data)
    ours = whole if layer is None else whole[layer]
    expected = torch.full((16, 6), -1.0)
    for rows, part in zip(
        (slice(4, 8), slice(12, 16)) if halves else (slice(8, 16),), values.chunk(1 + halves), strict=True
    ):
        expected[rows] = part
    assert torch.equal(ours, expected)
    assert (whole != -1).sum() == 48


def test_a_parameter_that_is_not_stored_as_it_lies_is_refused() -> None:
    """Rather than stored in another order."""
    values = torch.zeros(4, 6)

    def transposed(key: str, data: torch.Tensor, *_: object) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, data.t())

    described = ShardedTensor.from_rank_offsets("key", values)
    factory = apply_swiglu_sharded_factory(described, [])
    factory.build_fn = transposed
    with pytest.raises(NotImplementedError, match="key: is not stored as whole rows of its parameter"):
        stored_blocks(factory, values.shape, 0, 24)
