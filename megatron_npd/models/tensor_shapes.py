"""The shape of every tensor of a Hugging Face checkpoint, as its config.json implies it. Numbers alone, no torch."""

from __future__ import annotations

from megatron_npd.models.hf_config import ModelDims

_HEADS, _KV_HEADS = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
_SHAPES: dict[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("vocab_size", "hidden_size"),
    "lm_head.weight": ("vocab_size", "hidden_size"),
    "norm.weight": ("hidden_size",),
    "input_layernorm.weight": ("hidden_size",),
    "post_attention_layernorm.weight": ("hidden_size",),
    "q_proj.weight": (_HEADS, "hidden_size"),
    "q_proj.bias": (_HEADS,),
    "k_proj.weight": (_KV_HEADS, "hidden_size"),
    "k_proj.bias": (_KV_HEADS,),
    "v_proj.weight": (_KV_HEADS, "hidden_size"),
    "v_proj.bias": (_KV_HEADS,),
    "o_proj.weight": ("hidden_size", _HEADS),
    "o_proj.bias": ("hidden_size",),
    "q_norm.weight": ("head_dim",),
    "k_norm.weight": ("head_dim",),
    "gate_proj.weight": ("intermediate_size", "hidden_size"),
    "up_proj.weight": ("intermediate_size", "hidden_size"),
    "down_proj.weight": ("hidden_size", "intermediate_size"),
}
"""End of a tensor's name -> its dimensions, as config.json spells them."""


def implied_shape(name: str, dims: ModelDims) -> tuple[tuple[int, ...], str]:
    """The shape of a tensor that a model of these dimensions has, and how it is derived, for people."""
    sizes = {
        "vocab_size": dims.vocab_size,
        "hidden_size": dims.hidden_size,
        "intermediate_size": dims.intermediate_size,
        "head_dim": dims.head_dim,
        _HEADS: dims.num_heads * dims.head_dim,
        _KV_HEADS: dims.num_kv_heads * dims.head_dim,
    }
    named = _SHAPES[".".join(name.rsplit(".", 2)[-2:])]
    return tuple(sizes[size] for size in named), ", ".join(named)
