"""Where each Megatron parameter lies in a Hugging Face checkpoint. One declarative map per family, of shared pieces.

A `Rule` ties one Megatron parameter to the Hugging Face tensors it is made of; its `Layout` says how those are
merged and split over the tensor-parallel ranks. Conversion, loading and publishing all read the same rules, so they
cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_npd.hf_config import ModelDims


class Layout(Protocol):
    """How Hugging Face tensors become one rank's Megatron shard, and back."""

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
        return [torch.cat(shards, self.dim)]


class Vocabulary:
    """Rows cut over the ranks after padding with zero rows to a multiple of their number."""

    def shard(self, tensors: list[torch.Tensor], dims: ModelDims, rank: int, size: int) -> torch.Tensor:
        (rows,) = tensors
        local = -(-len(rows) // size)
        mine = rows[rank * local : (rank + 1) * local]
        return torch.nn.functional.pad(mine, (0, 0, 0, local - len(mine)))

    def unshard(self, shards: list[torch.Tensor], dims: ModelDims) -> list[torch.Tensor]:
        return [torch.cat(shards)[: dims.vocab_size]]


class GatedLinear:
    """gate and up projections, [2, F, H] cut along F: each rank holds its gate rows, then its up rows."""

    def shard(self, tensors: list[torch.Tensor], dims: ModelDims, rank: int, size: int) -> torch.Tensor:
        return torch.cat([tensor.chunk(size)[rank] for tensor in tensors])

    def unshard(self, shards: list[torch.Tensor], dims: ModelDims) -> list[torch.Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[part] for half in halves]) for part in (0, 1)]


class FusedQKV:
    """q, k, v interleaved by key-value group: [G, (H / G + 2) * D, ...], padded with zero groups and cut along G.

    For weights [rows, hidden] and biases [rows] alike.
    """

    def shard(self, tensors: list[torch.Tensor], dims: ModelDims, rank: int, size: int) -> torch.Tensor:
        groups = torch.cat([tensor.unflatten(0, (dims.num_kv_heads, -1)) for tensor in tensors], dim=1)
        return _pad_groups(groups, dims, size).chunk(size)[rank].flatten(0, 1)

    def unshard(self, shards: list[torch.Tensor], dims: ModelDims) -> list[torch.Tensor]:
        query_rows = dims.num_heads // dims.num_kv_heads * dims.head_dim
        groups = torch.cat(shards).unflatten(0, (-1, query_rows + 2 * dims.head_dim))[: dims.num_kv_heads]
        parts = groups.split([query_rows, dims.head_dim, dims.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]


class AttentionOutput:
    """Output projection [hidden, H * D]: its columns padded and cut by key-value group, as `FusedQKV` cuts rows."""

    def shard(self, tensors: list[torch.Tensor], dims: ModelDims, rank: int, size: int) -> torch.Tensor:
        groups = tensors[0].T.unflatten(0, (dims.num_kv_heads, -1))
        return _pad_groups(groups, dims, size).chunk(size)[rank].flatten(0, 1).T

    def unshard(self, shards: list[torch.Tensor], dims: ModelDims) -> list[torch.Tensor]:
        return [torch.cat(shards, dim=1)[:, : dims.num_heads * dims.head_dim]]


def _pad_groups(groups: torch.Tensor, dims: ModelDims, size: int) -> torch.Tensor:
    """[G, ...] with zero groups added until the ranks can share them (`ModelDims.padded_kv_heads`)."""
    added = dims.padded_kv_heads(size) - dims.num_kv_heads
    return torch.nn.functional.pad(groups, (0, 0) * (groups.ndim - 1) + (0, added))


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter (`{layer}` stands for the layer number) and the Hugging Face tensors it holds."""

    megatron: str
    hugging_face: tuple[str, ...]
    layout: Layout


_ATTENTION, _MLP = "decoder.layers.{layer}.self_attention.", "decoder.layers.{layer}.mlp."
_HF_LAYER = "model.layers.{layer}."
_HF_ATTENTION, _HF_MLP = _HF_LAYER + "self_attn.", _HF_LAYER + "mlp."

DENSE = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
    Rule("decoder.layers.{layer}.input_layernorm.weight", (_HF_LAYER + "input_layernorm.weight",), Replicated()),
    Rule(_ATTENTION + "linear_qkv.weight", tuple(_HF_ATTENTION + f"{part}_proj.weight" for part in "qkv"), FusedQKV()),
    Rule(_ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), AttentionOutput()),
    Rule(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        (_HF_LAYER + "post_attention_layernorm.weight",),
        Replicated(),
    ),
    Rule(_MLP + "linear_fc1.weight", (_HF_MLP + "gate_proj.weight", _HF_MLP + "up_proj.weight"), GatedLinear()),
    Rule(_MLP + "linear_fc2.weight", (_HF_MLP + "down_proj.weight",), Split(1)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated()),
)
"""What every Llama-shaped model has: RMSNorm before attention and MLP, no bias."""

QKV_BIAS = (
    Rule(_ATTENTION + "linear_qkv.bias", tuple(_HF_ATTENTION + f"{part}_proj.bias" for part in "qkv"), FusedQKV()),
)
QK_NORM = tuple(
    Rule(_ATTENTION + f"{part}_layernorm.weight", (_HF_ATTENTION + f"{part}_norm.weight",), Replicated())
    for part in "qk"
)

UNTIED_HEAD = Rule("output_layer.weight", ("lm_head.weight",), Vocabulary())
TIED_HEAD = Rule("output_layer.weight", ("model.embed_tokens.weight",), Vocabulary())
"""With tied embeddings the last pipeline stage keeps its own copy, loaded from and never written beside the first's."""

FAMILY_RULES = {"llama": DENSE, "qwen2": DENSE + QKV_BIAS, "qwen3": DENSE + QK_NORM}
"""`hf_config.Family.name` -> all its rules but the output head's."""


def rules_for(dims: ModelDims) -> dict[str, tuple[Rule, int]]:
    """Megatron parameter name -> (rule, layer number) for a whole model."""
    rules = (*FAMILY_RULES[dims.family], TIED_HEAD if dims.tied_embeddings else UNTIED_HEAD)
    named = {}
    for rule in rules:
        for layer in range(dims.num_layers) if "{layer}" in rule.megatron else (0,):
            named[rule.megatron.format(layer=layer)] = (rule, layer)
    return named


def hugging_face_names(rule: Rule, layer: int) -> list[str]:
    """Tensor names of a rule's Hugging Face side."""
    return [name.format(layer=layer) for name in rule.hugging_face]


def all_hugging_face_names(dims: ModelDims) -> Iterator[str]:
    """Every tensor a complete checkpoint of these dimensions holds."""
    seen = set()
    for rule, layer in rules_for(dims).values():
        for name in hugging_face_names(rule, layer):
            if name not in seen:
                seen.add(name)
                yield name


def unknown_hugging_face_names(found: Iterable[str], dims: ModelDims) -> list[str]:
    """Tensors of a checkpoint that no rule reads and that say something of their own, sorted.

    Left out are a stored copy of the tied head, which some writers add, and the rotary frequencies of old checkpoints.
    """
    ignored = {"lm_head.weight"} if dims.tied_embeddings else set()
    unknown = set(found) - set(all_hugging_face_names(dims)) - ignored
    return sorted(name for name in unknown if not name.endswith("rotary_emb.inv_freq"))


def is_tied_copy(name: str, dims: ModelDims) -> bool:
    """Whether a Megatron parameter is the last stage's copy of tied embeddings."""
    return dims.tied_embeddings and re.fullmatch(r"output_layer\.weight", name) is not None
