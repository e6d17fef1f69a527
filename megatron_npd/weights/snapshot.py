"""This rank's share of the model in host memory: gathered over tensor parallelism, in Hugging Face's layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from megatron_npd.distributed.collectives import gather_bytes
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.models.tensor_map import parameter_map
from megatron_npd.weights.buckets import LARGEST_BUCKET, SMALLEST_BUCKET, Bucket, deal_buckets, plan_buckets
from megatron_npd.weights.layouts import unshard

LARGEST_MESSAGE = 8 * 2**20
"""Bytes of one collective on CPUs. Larger ones, and the fresh memory they need, take several times as long."""
_ALIGNMENT = 64
"""Bytes; every bucket starts at a multiple."""


@dataclass(frozen=True)
class HostBucket:
    """One bucket in host memory: whole tensors in Hugging Face's layout, one after another."""

    number: int
    """Place among the buckets of its stage."""
    bucket: Bucket
    data: torch.Tensor
    """uint8 [bucket.nbytes]: what its file holds behind the header."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor) of each, as views of `data`."""
        start = 0
        for spec in self.bucket.tensors:
            part = self.data[start : start + spec.nbytes]
            yield spec.name, part.view(spec.dtype).view(spec.shape)
            start += spec.nbytes


class Snapshot:
    """Copies a stage's parameters, each bucket to the one rank that will write it. Iterating gives this rank's buckets
    as of the last `take`: all that a transport of weights needs.

    The ranks of a stage are (replica, tensor-parallel rank) with replicas over data and context parallelism. A bucket
    is gathered within one replica's tensor-parallel group only, so each rank sends and holds about its fraction.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        dims: ModelDims,
        parallel: Parallel,
        largest: int = LARGEST_BUCKET,
        smallest: int = SMALLEST_BUCKET,
    ):
        self._dims, self._parallel = dims, parallel
        writers = parallel.dp_size * parallel.cp_size * parallel.tp_size
        self.plan = plan_buckets(parameters, dims, parallel.tp_size, writers, largest, smallest)
        self._writers = deal_buckets([bucket.nbytes for bucket in self.plan], writers)
        replica = parallel.dp_rank * parallel.cp_size + parallel.cp_rank
        self._first_of_replica = replica * parallel.tp_size
        mine = self._first_of_replica + parallel.tp_rank
        self._copies = self._allocate([n for n, writer in enumerate(self._writers) if writer == mine])

    def __iter__(self) -> Iterator[HostBucket]:
        return iter(self._copies.values())

    @torch.no_grad()
    def take(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Copy the parameters, which may change as soon as it returns. A collective over tensor parallelism."""
        for number, bucket in enumerate(self.plan):
            owner = self._writers[number] - self._first_of_replica
            if 0 <= owner < self._parallel.tp_size:
                shards = gather_shards([parameters[name] for name in bucket.parameters], self._parallel, owner)
                if owner == self._parallel.tp_rank:
                    self._fill(self._copies[number], shards)
                else:
                    left = list(shards)  # takes part in gathering, which is a collective
                    assert not left, "and receives nothing"
        if self._parallel.device != "cpu":
            torch.cuda.current_stream().synchronize()

    def _fill(self, copy: HostBucket, shards: Iterator[list[torch.Tensor]]) -> None:
        mapped, places = parameter_map(self._dims), dict(copy.tensors())
        for name, shards_of_one in zip(copy.bucket.parameters, shards, strict=True):
            for hf_name, tensor in unshard(mapped[name], shards_of_one, self._dims).items():
                places[hf_name].copy_(tensor, non_blocking=True)

    def _allocate(self, numbers: list[int]) -> dict[int, HostBucket]:
        """Memory kept for every publication to come: fresh memory costs a page fault per page while training waits."""
        sizes = [-(-self.plan[number].nbytes // _ALIGNMENT) * _ALIGNMENT for number in numbers]
        on_gpu = self._parallel.device != "cpu"
        memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=on_gpu)
        starts = accumulate(sizes, initial=0)
        return {
            number: HostBucket(number, bucket := self.plan[number], memory[start : start + bucket.nbytes])
            for number, start in zip(numbers, starts, strict=False)
        }


def gather_shards(parameters: Sequence[torch.Tensor], parallel: Parallel, owner: int) -> Iterator[list[torch.Tensor]]:
    """Every tensor-parallel rank's shard of each parameter, on tensor-parallel rank `owner`; nothing elsewhere.

    A collective over the tensor-parallel group (to be iterated to its end on every rank), which sends bytes, so any
    dtype will do. Without tensor parallelism the parameters themselves are returned.
    """
    if parallel.tp_group is None:
        yield from ([parameter] for parameter in parameters)
        return
    limit = LARGEST_MESSAGE if parallel.device == "cpu" else LARGEST_BUCKET
    for parcel in _parcels(parameters, limit):
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in parcel])
        received = [torch.empty_like(flat) for _ in range(parallel.tp_size)] if parallel.tp_rank == owner else []
        gather_bytes([shard.view(torch.uint8) for shard in received], flat.view(torch.uint8), parallel, owner, limit)
        pieces = [shard.split([parameter.numel() for parameter in parcel]) for shard in received]
        for parameter, shards in zip(parcel, zip(*pieces, strict=True), strict=False):
            yield [shard.view(parameter.shape) for shard in shards]


def _parcels(parameters: Sequence[torch.Tensor], limit: int) -> Iterator[list[torch.Tensor]]:
    """Neighbours of at most `limit` bytes together; a larger parameter alone."""
    parcel: list[torch.Tensor] = []
    for parameter in parameters:
        if parcel and sum(other.nbytes for other in parcel) + parameter.nbytes > limit:
            yield parcel
            parcel = []
        parcel.append(parameter)
    yield parcel
