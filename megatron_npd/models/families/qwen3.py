"""Qwen3, dense: RMSNorm on query and key heads. With attention_bias, vLLM would lack the output projection's bias."""

from __future__ import annotations

from megatron_npd.models.families.family import DENSE, QK_NORM, Family

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    tensors=DENSE + QK_NORM,
    qk_norm=True,
    num_kv_heads=32,
    head_dim=128,
    must_be_false=("attention_bias", "use_sliding_window"),
)
