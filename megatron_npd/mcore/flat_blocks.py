"""A run of elements of a flattened tensor, as blocks that checkpoints can store.

The distributed optimizer gives each data-parallel rank a contiguous run of a parameter's elements, which may begin and
end in the middle of a row. A checkpoint stores blocks: an offset and a shape in the tensor's own dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredBlock:
    """A block of a stored tensor, and the elements of the parameter that belong there."""

    start: int
    stop: int
    """Of the parameter, flattened."""
    described: ShardedTensor
    """Without data."""

    def holding(self, flat: torch.Tensor, first: int, key: str) -> ShardedTensor:
        """The block with its data, which share the memory of `flat`, under `key`.

        Args:
            flat: [elements]; the first one is the parameter's element number `first`.
        """
        data = flat[self.start - first : self.stop - first].view(self.described.local_shape)
        return replace(self.described, key=key, data=data, dtype=data.dtype)


def stored_blocks(
    described: ShardedTensor | ShardedTensorFactory, shape: Shape, start: int, stop: int
) -> list[StoredBlock]:
    """Elements `start` to `stop` of a parameter as blocks of the tensors that `described` stores it in.

    `described` may be a factory, which makes several stored tensors of one parameter (SwiGLU's two halves). `shape`:
    of the parameter on this rank.
    """
    found = []
    for stored in _stored(described, shape):
        # A part of a tensor without memory still knows where it begins.
        first = stored.data.storage_offset()
        inside = range(max(start, first), min(stop, first + stored.data.numel()))
        lead = (1,) * stored.prepend_axis_num
        for offset, block in blocks(stored.data.shape, inside.start - first, inside.stop - first):
            begin = first + _flat(offset, stored.data.shape)
            place = tuple(a + b for a, b in zip(stored.global_offset, (0,) * len(lead) + offset, strict=True))
            changes: dict[str, Any] = {"global_offset": place, "local_shape": lead + block, "prepend_axis_num": 0}
            # No fragmentation: the blocks of all ranks make no regular grid.
            where = replace(stored, data=None, axis_fragmentations=None, **changes)
            found.append(StoredBlock(begin, begin + math.prod(block), where))
    return found


def blocks(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """(offset, shape) of as few blocks as hold the elements `start` to `stop` of a flattened tensor, in their order:
    each is contiguous in memory. None if there are no elements."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,)[: len(shape)], (stop - start,)[: len(shape)]
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # all in the middle of one row
        yield from _in_row(last, shape, start - last * row, stop - last * row)
        return
    yield from _in_row(first - 1, shape, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(last, shape, 0, stop - last * row)


def _in_row(number: int, shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    for offset, block in blocks(shape[1:], start, stop):
        yield (number, *offset), (1, *block)


def _flat(offset: Shape, shape: Shape) -> int:
    number = 0
    for position, size in zip(offset, shape, strict=True):
        number = number * size + position
    return number


def _stored(described: ShardedTensor | ShardedTensorFactory, shape: Shape) -> list[ShardedTensor]:
    """The stored tensors, whose data are parts of one tensor without memory."""
    whole = torch.empty(shape, device="meta", dtype=described.data.dtype)
    made = replace(described, data=whole)
    if isinstance(made, ShardedTensorFactory):
        made = made.build()
    tensors = [made] if isinstance(made, ShardedTensor) else list(made)
    for tensor in tensors:
        if tensor.data.untyped_storage()._cdata != whole.untyped_storage()._cdata or not tensor.data.is_contiguous():
            raise NotImplementedError(f"{tensor.key}: is not stored as whole rows of its parameter")
    return tensors
