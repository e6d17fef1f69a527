"""Llama 2 and 3, SmolLM2, and whatever else says LlamaForCausalLM."""

from __future__ import annotations

from megatron_npd.models.families.family import ATTENTION_BIAS, DENSE, AttentionBias, Family

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    tensors=DENSE + ATTENTION_BIAS,
    bias=AttentionBias(output=True, key="attention_bias"),
    must_be_false=("mlp_bias",),
)
