"""The arithmetic of every `Layout`: how Hugging Face tensors become one rank's Megatron shard, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_npd.models.families.family import Layout
from megatron_npd.models.hf_config import ModelDims, padded_vocab_size
from megatron_npd.models.tensor_map import MappedParameter


class Arithmetic(Protocol):
    """What a layout does to tensors."""

    def shard(self, tensors: list[torch.Tensor], dims: ModelDims, rank: int, size: int) -> torch.Tensor:
        """Megatron shard of tensor-parallel `rank` of `size`."""

    def unshard(self, shards: list[torch.Tensor], dims: ModelDims) -> list[torch.Tensor]:
        """Hugging Face tensors from the shards of all ranks."""


class Replicated:
    """The same on every rank."""

    def shard(self, tensors: list[torch.Tensor], dims: ModelDims, rank: int, size: int) -> torch.Tensor:
        return tensors[0]

    def unshard(self, shards: list[torch.Tensor], dims: ModelDims) -> list[torch.Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Split:
    """Cut along one dimension: 0 for column-parallel, 1 for row-parallel linear layers."""

    dim: int

    def shard(self, tensors: list[torch.Tensor], dims: ModelDims, rank: int, size: int) -> torch.Tensor:
        return tensors[0].chunk(size, self.dim)[rank]

    def unshard(self, shards: list[torch.Tensor], dims: ModelDims) -> list[torch.Tensor]:
        return [_joined(shards, self.dim)]


class Vocabulary:
    """Rows cut over the ranks after padding with zero rows to a multiple of their number."""

    def shard(self, tensors: list[torch.Tensor], dims: ModelDims, rank: int, size: int) -> torch.Tensor:
        (rows,) = tensors
        if len(rows) != dims.vocab_size:
            raise ValueError(f"{len(rows)} rows, not vocab_size = {dims.vocab_size}")
        local = padded_vocab_size(dims.rows, size) // size
        mine = rows[rank * local : (rank + 1) * local]
        return torch.nn.functional.pad(mine, (0, 0, 0, local - len(mine))) if len(mine) < local else mine

    def unshard(self, shards: list[torch.Tensor], dims: ModelDims) -> list[torch.Tensor]:
        return [_joined(shards)[: dims.vocab_size]]


class GatedLinear:
    """gate and up projections, [2, F, H] cut along F: each rank holds its gate rows, then its up rows."""

    def shard(self, tensors: list[torch.Tensor], dims: ModelDims, rank: int, size: int) -> torch.Tensor:
        return torch.cat([tensor.chunk(size)[rank] for tensor in tensors])

    def unshard(self, shards: list[torch.Tensor], dims: ModelDims) -> list[torch.Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [_joined([half[part] for half in halves]) for part in (0, 1)]


class FusedQKV:
    """q, k, v interleaved by key-value group: [G, (H / G + 2) * D, ...], padded with zero groups and cut along G.

    For weights [rows, hidden] and biases [rows] alike.
    """

    def shard(self, tensors: list[torch.Tensor], dims: ModelDims, rank: int, size: int) -> torch.Tensor:
        groups = torch.cat([tensor.unflatten(0, (dims.num_kv_heads, -1)) for tensor in tensors], dim=1)
        return _pad_groups(groups, dims, size).chunk(size)[rank].flatten(0, 1)

    def unshard(self, shards: list[torch.Tensor], dims: ModelDims) -> list[torch.Tensor]:
        query_rows = dims.num_heads // dims.num_kv_heads * dims.head_dim
        groups = _joined(shards).unflatten(0, (-1, query_rows + 2 * dims.head_dim))[: dims.num_kv_heads]
        parts = groups.split([query_rows, dims.head_dim, dims.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]


class AttentionOutput:
    """Output projection [hidden, H * D]: its columns padded and cut by key-value group, as `FusedQKV` cuts rows."""

    def shard(self, tensors: list[torch.Tensor], dims: ModelDims, rank: int, size: int) -> torch.Tensor:
        groups = tensors[0].T.unflatten(0, (dims.num_kv_heads, -1))
        return _pad_groups(groups, dims, size).chunk(size)[rank].flatten(0, 1).T

    def unshard(self, shards: list[torch.Tensor], dims: ModelDims) -> list[torch.Tensor]:
        return [_joined(shards, dim=1)[:, : dims.num_heads * dims.head_dim]]


def _joined(shards: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """The shards one after another; a single one as it is, without a copy."""
    return torch.cat(shards, dim) if len(shards) > 1 else shards[0]


def _pad_groups(groups: torch.Tensor, dims: ModelDims, size: int) -> torch.Tensor:
    """[G, ...] with zero groups added until the ranks can share them (`ModelDims.padded_kv_heads`)."""
    added = dims.padded_kv_heads(size) - dims.num_kv_heads
    return torch.nn.functional.pad(groups, (0, 0) * (groups.ndim - 1) + (0, added)) if added else groups


ARITHMETIC: dict[Layout, Arithmetic] = {
    Layout.REPLICATED: Replicated(),
    Layout.COLUMNS: Split(1),
    Layout.VOCABULARY: Vocabulary(),
    Layout.GATED: GatedLinear(),
    Layout.QKV: FusedQKV(),
    Layout.ATTENTION_OUTPUT: AttentionOutput(),
}


def shard(
    parameter: MappedParameter, tensors: list[torch.Tensor], dims: ModelDims, rank: int, size: int
) -> torch.Tensor:
    """A parameter's Megatron shard of tensor-parallel `rank` of `size`, from its Hugging Face tensors, in order."""
    return ARITHMETIC[parameter.layout].shard(tensors, dims, rank, size)


def unshard(parameter: MappedParameter, shards: list[torch.Tensor], dims: ModelDims) -> dict[str, torch.Tensor]:
    """A parameter's Hugging Face tensors, by name in their order, from the shards of all tensor-parallel ranks."""
    tensors = ARITHMETIC[parameter.layout].unshard(shards, dims)
    return dict(zip(parameter.hugging_face, tensors, strict=True))
