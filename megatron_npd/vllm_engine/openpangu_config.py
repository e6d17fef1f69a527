"""The configuration class of openPangu for transformers, which vLLM reads configurations through.

Released checkpoints bring a class of their own as code. With this one registered nothing of theirs is run, even where
`models.trust_remote_code` would let it.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlamaConfig

from megatron_npd.models.families.openpangu import FAMILY


class PanguEmbeddedConfig(LlamaConfig):
    """A Llama's fields, and `bias` (of q, k, v and o), which vLLM's model asks for; defaults as in `families`."""

    model_type = "PanguEmbedded"

    def __init__(self, **fields: Any):
        assert FAMILY.bias is not None and FAMILY.bias.key is not None
        bias = fields.pop(FAMILY.bias.key, FAMILY.bias.default)
        fields = {"num_key_value_heads": FAMILY.num_kv_heads, "rms_norm_eps": FAMILY.rms_norm_eps} | fields
        if not any("rope_theta" in (fields.get(key) or {}) for key in ("rope_scaling", "rope_parameters")):
            fields.setdefault("rope_theta", FAMILY.rope_theta)
        super().__init__(**fields)
        self.bias = bias


def register_openpangu() -> None:
    """Let `AutoConfig` know the type. May be called any number of times."""
    AutoConfig.register(PanguEmbeddedConfig.model_type, PanguEmbeddedConfig, exist_ok=True)
