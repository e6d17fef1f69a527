"""Collectives: what the ranks of one role tell each other. Nobody else calls those of torch.distributed.

What ranks agree on travels over the CPU, so no GPU waits for it. Objects are pickled: between ranks of one role only,
which trust each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_npd.distributed.parallel import Parallel

T = TypeVar("T")


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()


def broadcast_object(value: T, source: int = 0) -> T:
    """The `source` rank's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: T, parallel: Parallel) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    values = [value]
    if parallel.world_size > 1:
        values = [value] * parallel.world_size
        dist.all_gather_object(values, value)
    return values


def greatest(values: Iterable[float], parallel: Parallel) -> list[float]:
    """The largest of each value over all ranks; whole numbers stay whole (int64), others are float64."""
    values = list(values)
    if parallel.world_size == 1:
        return values
    are_whole = all(isinstance(value, int) for value in values)
    largest = torch.tensor(values, dtype=torch.int64 if are_whole else torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def over_tensor_ranks(x: torch.Tensor, parallel: Parallel) -> torch.Tensor:
    """Every tensor-parallel rank's x, stacked, on each of them: [R, ...]."""
    if parallel.tp_group is None:
        return x[None]
    parts = [torch.empty_like(x) for _ in range(parallel.tp_size)]
    dist.all_gather(parts, x.contiguous(), group=parallel.tp_group)
    return torch.stack(parts)


def gather_bytes(
    received: Sequence[torch.Tensor], sent: torch.Tensor, parallel: Parallel, owner: int, limit: int
) -> None:
    """Bring every tensor-parallel rank's bytes to one of them, at most `limit` at a time.

    Args:
        received: uint8 [n] to be filled for each tensor-parallel rank, on rank `owner`; empty elsewhere.
        sent: this rank's, uint8 [n].
    """
    for start in range(0, len(sent), limit):
        part = slice(start, start + limit)
        outputs = [shard[part] for shard in received] or None
        dist.gather(sent[part], outputs, group=parallel.tp_group, group_dst=owner)
