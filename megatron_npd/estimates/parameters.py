"""Parameters of a model, counted without building it: of the whole, and of each pipeline stage's ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_npd.models.hf_config import ModelDims, padded_vocab_size


@dataclass(frozen=True)
class Widths:
    """Columns of a layer on one tensor-parallel rank, heads padded to fit."""

    query: int
    key: int
    """Of the keys, and as many of the values."""
    query_heads: int
    key_heads: int
    mlp: int
    vocabulary: int

    @staticmethod
    def of(dims: ModelDims, tensor_parallel: int) -> Widths:
        key_heads = dims.padded_kv_heads(tensor_parallel) // tensor_parallel
        query_heads = key_heads * (dims.num_heads // dims.num_kv_heads)
        return Widths(
            query=query_heads * dims.head_dim,
            key=key_heads * dims.head_dim,
            query_heads=query_heads,
            key_heads=key_heads,
            mlp=dims.intermediate_size // tensor_parallel,
            vocabulary=padded_vocab_size(dims.vocab_size, tensor_parallel) // tensor_parallel,
        )


def layer_parameters(dims: ModelDims, tensor_parallel: int = 1) -> int:
    """Parameters of one layer on one rank."""
    widths, hidden = Widths.of(dims, tensor_parallel), dims.hidden_size
    qkv = widths.query + 2 * widths.key
    matrices = hidden * (qkv + widths.query + 3 * widths.mlp)
    biases = dims.qkv_bias * qkv + dims.output_bias * hidden
    norms = 2 * hidden + dims.qk_norm * 2 * dims.head_dim
    return matrices + biases + norms


def stage_parameters(dims: ModelDims, tensor_parallel: int = 1, pipeline: int = 1, stage: int = 0) -> int:
    """Parameters of one rank of a pipeline stage. The default: of the whole model.

    With several stages a tied embedding exists twice: on the first, and as the output layer on the last.
    """
    table = Widths.of(dims, tensor_parallel).vocabulary * dims.hidden_size
    parameters = dims.num_layers // pipeline * layer_parameters(dims, tensor_parallel)
    if stage == 0:
        parameters += table
    if stage == pipeline - 1:
        parameters += dims.hidden_size  # the last norm
        parameters += 0 if dims.tied_embeddings and pipeline == 1 else table
    return parameters
