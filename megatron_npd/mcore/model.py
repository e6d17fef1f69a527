"""Building Megatron-Core GPT models from Hugging Face dimensions, and running them on packed batches."""

from __future__ import annotations

import logging
import re

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_npd.hf_config import ModelDims
from megatron_npd.mcore.attention import attention_module, packed_sequences
from megatron_npd.parallel import Parallel

logger = logging.getLogger(__name__)


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight is marked for sequence parallelism (Megatron's local one refuses it)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding over all ranks: the next multiple of the tensor-parallel size."""
    return -(-vocab_size // tensor_model_parallel_size) * tensor_model_parallel_size


def valid_vocab_columns(vocab_size: int, parallel: Parallel, limit: int | None = None) -> int:
    """Columns of this rank's logits that are real tokens; the rest is padding and enters no softmax.

    `limit`: only ids below it count as real (the vocabulary two models have in common).
    """
    local = padded_vocab_size(vocab_size, parallel.tp_size) // parallel.tp_size
    real = vocab_size if limit is None else min(vocab_size, limit)
    return min(max(real - parallel.tp_rank * local, 0), local)


def build_gpt(
    dims: ModelDims,
    parallel: Parallel,
    dtype: torch.dtype,
    attention_backend: str,
    sequence_parallel: bool = False,
    padded_for: int | None = None,
) -> GPTModel:
    """This rank's part of a GPT model, randomly initialised: load weights before use.

    `padded_for`: pad heads and vocabulary as for this tensor-parallel size instead of the layout's own, to load a
    Megatron checkpoint that was saved at it.

    Run it with `forward_packed`.
    """
    padded_for = padded_for or parallel.tp_size
    kv_heads = dims.padded_kv_heads(padded_for)
    if kv_heads != dims.num_kv_heads:
        logger.info(
            "key-value heads padded with zeros from %d to %d for TP %d", dims.num_kv_heads, kv_heads, padded_for
        )
    config = TransformerConfig(
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
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Gradients are sums over tokens, divided once by the global batch's response tokens.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        use_cpu_initialization=parallel.device == "cpu",
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    model = GPTModel(
        config,
        _block_spec(config, attention_backend),
        vocab_size=padded_vocab_size(dims.vocab_size, padded_for),
        max_sequence_length=dims.max_positions,
        pre_process=parallel.is_first_stage,
        post_process=parallel.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=dims.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=dims.rope_theta,
    )
    if parallel.is_last_stage:
        _project_selected_rows(model, sequence_parallel)
    return model.to(dtype=dtype, device=parallel.device)


def forward_packed(
    model: torch.nn.Module, tokens_T: torch.Tensor, cu_seqlens: torch.Tensor, rows_N: torch.Tensor
) -> torch.Tensor:
    """One forward over a packed batch: logits [N, V / TP] on the last stage, else hidden states for the next.

    Only `rows_N` (int64, positions whose logits are wanted) are projected to the vocabulary: prompts and padding are
    often half of a batch, and the projection is a third of a small model's work.
    """
    getattr(model, "module", model).projected_rows = rows_N
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    starts_T = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths, output_size=len(tokens_T))
    positions_T = torch.arange(len(tokens_T), device=tokens_T.device) - starts_T
    output = model(tokens_T[None], positions_T[None], None, packed_seq_params=packed_sequences(cu_seqlens))
    return output[0] if parallel_state.is_pipeline_last_stage() else output


def named_parameters(model: GPTModel) -> dict[str, torch.nn.Parameter]:
    """Parameters by name with layers numbered over the whole model, whatever pipeline stage this is."""
    numbers = {index: layer.layer_number - 1 for index, layer in enumerate(model.decoder.layers)}

    def to_global(name: str) -> str:
        return re.sub(r"decoder\.layers\.(\d+)", lambda m: f"decoder.layers.{numbers[int(m.group(1))]}", name)

    return {to_global(name): parameter for name, parameter in model.named_parameters()}


def _project_selected_rows(model: GPTModel, sequence_parallel: bool) -> None:
    """Make the output layer see only `model.projected_rows` of its input.

    Under sequence parallelism the layer itself would gather the sequence; rows can only be picked after that, so the
    gather moves before the layer, which then reduces its input's gradient as it does without sequence parallelism.
    """
    layer = model.output_layer
    if sequence_parallel:
        layer.sequence_parallel, layer.allreduce_dgrad = False, True

    def select(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_T1H = inputs[0]
        if sequence_parallel:
            hidden_T1H = gather_from_sequence_parallel_region(hidden_T1H, tensor_parallel_output_grad=False)
        return (hidden_T1H.index_select(0, model.projected_rows), *inputs[1:])

    layer.register_forward_pre_hook(select)


def _block_spec(config: TransformerConfig, attention_backend: str) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = ModuleSpec(attention_module(attention_backend))
    layers = get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
