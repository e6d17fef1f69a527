"""Building Megatron-Core GPT models from Hugging Face dimensions, and running them on packed batches.

Legend: T this rank's tokens of a pack, N rows to score (positions that predict a response token), H hidden size,
V columns of this rank's logits.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_npd.distributed.parallel import Parallel
from megatron_npd.mcore import acceleration
from megatron_npd.mcore.acceleration import Acceleration
from megatron_npd.mcore.attention import attention_module
from megatron_npd.mcore.packed import packed_sequences
from megatron_npd.mcore.rotary import PackedRotary, compile_turning, inverse_frequencies
from megatron_npd.models.hf_config import ModelDims, padded_vocab_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelOptions:
    """How a model computes; never what."""

    attention_backend: str
    sequence_parallel: bool = False
    recompute: str = "none"
    """Activations computed again in the backward: none, selective (core attention), block (`recompute_layers` whole
    layers of a pipeline stage) or full (all)."""
    recompute_layers: int = 1
    acceleration: Acceleration = acceleration.NONE


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight is marked for sequence parallelism (Megatron's local one refuses it)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class SelectedRows(ColumnParallelLinear):
    """The output layer, which hands over the hidden states to score instead of projecting all of them.

    The projection is a third of a small model's work and its logits are the largest tensor there is, so whoever
    scores projects only `rows` of this rank's sequence, chunk by chunk (`kernels.linear_ce_topk_kl`), with
    `head_weight`. Each rank's gradient of what is returned covers its own columns; they are summed here.
    """

    rows: torch.Tensor

    def forward(self, input_: torch.Tensor, weight: Any = None, runtime_gather_output: Any = None) -> tuple:
        """Hidden states [T, 1, H] (a slice of T under sequence parallelism) -> [N, 1, H] on every rank, None."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(input_).index_select(0, self.rows), None
        return copy_to_tensor_model_parallel_region(input_.index_select(0, self.rows)), None


def valid_vocab_columns(vocab_size: int, parallel: Parallel, limit: int | None = None) -> int:
    """Columns of this rank's logits that are real tokens; the rest is padding and enters no softmax.

    `limit`: only ids below it count as real (the vocabulary two models have in common).
    """
    local = padded_vocab_size(vocab_size, parallel.tp_size) // parallel.tp_size
    real = vocab_size if limit is None else min(vocab_size, limit)
    return min(max(real - parallel.tp_rank * local, 0), local)


def build_gpt(dims: ModelDims, parallel: Parallel, dtype: torch.dtype, options: ModelOptions) -> list[GPTModel]:
    """This rank's chunks of a GPT model (one, or several in an interleaved pipeline), randomly initialised.

    Load weights before use; run it with `forward_packed`.
    """
    kv_heads = dims.padded_kv_heads(parallel.tp_size)
    if kv_heads != dims.num_kv_heads:
        logger.info(
            "key-value heads padded with zeros from %d to %d for TP %d", dims.num_kv_heads, kv_heads, parallel.tp_size
        )
    config = _transformer_config(dims, kv_heads, parallel, dtype, options)
    chunks = []
    for stage in range(parallel.virtual_pp_size):
        virtual_stage = stage if parallel.virtual_pp_size > 1 else None
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage)
        model = GPTModel(
            config,
            _block_spec(config, dims, options, virtual_stage),
            vocab_size=padded_vocab_size(dims.rows, parallel.tp_size),
            max_sequence_length=dims.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage),
            post_process=is_last,
            parallel_output=True,
            share_embeddings_and_output_weights=dims.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=dims.rope_theta,
            vp_stage=virtual_stage,
        )
        if dims.rope_scaling is not None:
            model.rotary_pos_emb.inv_freq = inverse_frequencies(dims).to(parallel.device)
        if not config.apply_rope_fusion:
            model.rotary_pos_emb.__class__ = PackedRotary
            if parallel.device.startswith("cuda"):
                compile_turning()
        if is_last:
            model.output_layer.__class__ = SelectedRows  # GPTModel builds the layer itself; only its forward differs
        chunks.append(model.to(dtype=dtype, device=parallel.device))
    return chunks


def forward_packed(
    model: torch.nn.Module, tokens_T: torch.Tensor, cu_seqlens: np.ndarray, rows_N: torch.Tensor, parallel: Parallel
) -> torch.Tensor:
    """One forward over a packed batch: hidden states to score, [N, H], on the last stage, else those for the next.

    Args:
        tokens_T: this rank's tokens: the whole pack, or its context-parallel share.
        cu_seqlens: int32, bounds of the WHOLE pack's sequences, in host memory.
        rows_N: int64, which of this rank's tokens to score.
    """
    gpt = unwrap(model)
    if gpt.post_process:
        gpt.output_layer.rows = rows_N
    fused = gpt.config.apply_rope_fusion
    packed = packed_sequences(cu_seqlens, parallel.cp_rank, parallel.cp_size, parallel.device, fused)
    if not fused:
        gpt.rotary_pos_emb.positions = packed.positions
    output = model(tokens_T[None], None, None, packed_seq_params=packed)
    return output[0] if gpt.post_process else output


def head_weight(model: torch.nn.Module) -> torch.Tensor:
    """This rank's rows of the projection to the vocabulary, [V, H]; on the last stage."""
    gpt = unwrap(model)
    tied = gpt.share_embeddings_and_output_weights
    return gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight


def projected(
    model: torch.nn.Module, hidden_NH: torch.Tensor, chunk_tokens: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, their logits [chunk, V]) of successive chunks; no more than one exists at a time."""
    weight_VH = head_weight(model)
    for start in range(0, len(hidden_NH), chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, len(hidden_NH)))
        yield rows, hidden_NH[rows] @ weight_VH.T


def named_parameters(chunks: Sequence[GPTModel]) -> dict[str, torch.nn.Parameter]:
    """Parameters by name, whatever the pipeline stage and the layer implementation.

    Layers are numbered over the whole model; norms that Transformer Engine fuses into the linear layer behind them
    have the names they have without it.
    """
    named = {}
    for model in chunks:
        numbers = {index: layer.layer_number - 1 for index, layer in enumerate(model.decoder.layers)}
        for name, parameter in model.named_parameters():
            name = re.sub(r"decoder\.layers\.(\d+)", lambda m, n=numbers: f"decoder.layers.{n[int(m.group(1))]}", name)
            for fused, plain in FUSED_NORMS.items():
                name = name.replace(fused, plain)
            named[name] = parameter
    return named


FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Name in Transformer Engine's layers -> name in Megatron's own."""


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The model inside a data-parallel wrapper, or the model itself."""
    return getattr(model, "module", model)


def _transformer_config(
    dims: ModelDims, kv_heads: int, parallel: Parallel, dtype: torch.dtype, options: ModelOptions
) -> TransformerConfig:
    on_gpu = parallel.device.startswith("cuda")
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "block": {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": options.recompute_layers,
        },
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[options.recompute]
    return TransformerConfig(
        num_layers=dims.num_layers,
        hidden_size=dims.hidden_size,
        num_attention_heads=kv_heads * (dims.num_heads // dims.num_kv_heads),
        num_query_groups=kv_heads,
        kv_channels=dims.head_dim,
        ffn_hidden_size=dims.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=dims.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=dims.qkv_bias,
        qk_layernorm=dims.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pp_size if parallel.virtual_pp_size > 1 else None,
        # Of two stages each is the other's next AND previous; only sends and receives of their own keep them apart.
        overlap_p2p_comm=parallel.virtual_pp_size > 1,
        batch_p2p_comm=parallel.virtual_pp_size == 1,
        context_parallel_size=parallel.cp_size,
        sequence_parallel=options.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Gradients are sums over tokens, divided once by the global batch's response tokens.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        use_cpu_initialization=parallel.device in ("cpu", "meta"),  # meta: a model without memory, see torch_dist
        gradient_accumulation_fusion=options.acceleration.gradient_accumulation_fusion,
        bias_dropout_fusion=False,
        # SwiGLU in one kernel, which torch compiles.
        bias_activation_fusion=on_gpu,
        masked_softmax_fusion=False,
        # Transformer Engine's attention wants the sequences' bounds on the device, and so does its rotary embedding.
        apply_rope_fusion=options.acceleration.transformer_engine or options.attention_backend == "te",
        # Or the embedding's backward sums in any order.
        deterministic_mode=on_gpu and torch.are_deterministic_algorithms_enabled(),
        persist_layer_norm=False,
        **recompute,
    )


def _block_spec(
    config: TransformerConfig, dims: ModelDims, options: ModelOptions, virtual_stage: int | None
) -> TransformerBlockSubmodules:
    if options.acceleration.transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
            layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(attention_module(options.attention_backend))
    if dims.output_bias:
        attention.linear_proj = _with_bias(attention.linear_proj)
    layers = get_num_layers_to_build(config, virtual_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


def _with_bias(linear: type) -> type:
    """A linear layer that always has a bias: Megatron has one switch for this and the MLP."""

    class Biased(linear):
        def __init__(self, *arguments: Any, **keywords: Any):
            super().__init__(*arguments, **keywords | {"bias": True})

    return Biased
