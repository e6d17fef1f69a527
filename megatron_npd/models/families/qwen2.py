"""Qwen2 and Qwen2.5 (Math, Coder): biases on q, k and v."""

from __future__ import annotations

from megatron_npd.models.families.family import ATTENTION_BIAS, DENSE, AttentionBias, Family

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    tensors=DENSE + ATTENTION_BIAS,
    bias=AttentionBias(output=False),
    num_kv_heads=32,
    must_be_false=("use_sliding_window",),
)
