"""Which parameters travel together when a version is published, and which rank writes them. Pure functions of shapes.

A bucket is some parameters of one pipeline stage: gathered in one go, held by one rank, written as one file. Every rank
of a stage computes the same plan from its own shards, so nothing about it is communicated.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from megatron_npd.models.hf_config import ModelDims
from megatron_npd.models.tensor_map import is_tied_copy, parameter_map
from megatron_npd.weights.layouts import unshard
from megatron_npd.weights.safetensors_writer import TensorSpec

LARGEST_BUCKET = 256 * 2**20
"""Bytes. Bounds what gathering needs on the device beyond the model; a parameter above it is a bucket of its own."""
SMALLEST_BUCKET = 8 * 2**20
"""Bytes. A small model is not spread over more files than there is something to gain."""


@dataclass(frozen=True)
class Bucket:
    """Parameters of one pipeline stage that are gathered together, and the Hugging Face tensors they become."""

    parameters: tuple[str, ...]
    """Megatron names."""
    tensors: tuple[TensorSpec, ...]
    """All of one dtype, in the parameters' order."""

    @property
    def nbytes(self) -> int:
        """Of the tensors, back to back."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_buckets(
    parameters: Mapping[str, torch.Tensor],
    dims: ModelDims,
    tensor_parallel_size: int,
    writers: int,
    largest: int = LARGEST_BUCKET,
    smallest: int = SMALLEST_BUCKET,
) -> list[Bucket]:
    """Cut a stage's parameters, in their order, into buckets of one dtype.

    Args:
        parameters: one rank's shards by Megatron name; only shapes and dtypes are looked at.
        writers: ranks that share the stage. Buckets are small enough to give each about as many bytes.
        largest: bytes no bucket exceeds, unless it is a single parameter.
        smallest: buckets are not made smaller than this for the sake of sharing.

    Returns:
        Buckets that hold every parameter once, except the last stage's copy of tied embeddings.
    """
    singles = _single_buckets(parameters, dims, tensor_parallel_size)
    total = sum(single.nbytes for single in singles)
    bound = min(largest, max(smallest, total // (2 * writers) if writers > 1 else total))
    groups: list[list[Bucket]] = []
    room = 0
    for single in singles:
        if single.nbytes > room or single.tensors[0].dtype != groups[-1][0].tensors[0].dtype:
            groups.append([])
            room = bound
        groups[-1].append(single)
        room -= single.nbytes
    return [_merged(group) for group in groups]


def deal_buckets(sizes: Sequence[int], writers: int) -> list[int]:
    """The writer, in [0, writers), of every bucket: largest first, each to the one with the fewest bytes so far."""
    given = [0] * len(sizes)
    least = [(0, writer) for writer in range(writers)]
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        held, writer = heapq.heappop(least)
        given[number] = writer
        heapq.heappush(least, (held + sizes[number], writer))
    return given


def _single_buckets(parameters: Mapping[str, torch.Tensor], dims: ModelDims, tensor_parallel_size: int) -> list[Bucket]:
    """One bucket a parameter. What a parameter becomes is seen from tensors without data."""
    mapped, buckets = parameter_map(dims), []
    for name, parameter in parameters.items():
        if not is_tied_copy(name, dims):
            shard = torch.empty_like(parameter, device="meta")
            tensors = unshard(mapped[name], [shard] * tensor_parallel_size, dims)
            specs = tuple(TensorSpec(hf_name, tuple(tensor.shape), tensor.dtype) for hf_name, tensor in tensors.items())
            buckets.append(Bucket((name,), specs))
    return buckets


def _merged(group: list[Bucket]) -> Bucket:
    parameters, tensors = zip(*((bucket.parameters, bucket.tensors) for bucket in group), strict=True)
    return Bucket(tuple(chain(*parameters)), tuple(chain(*tensors)))
