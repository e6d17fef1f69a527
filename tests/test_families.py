"""Every family from its config.json alone: transformers' own defaults; what would compute otherwise is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tiny_models import FAMILIES, make_model
from transformers import AutoConfig

from megatron_npd.errors import UserError
from megatron_npd.hf_config import FAMILIES as ARCHITECTURES
from megatron_npd.hf_config import read_model_dims
from megatron_npd.launch.checkpoint import check_checkpoint
from megatron_npd.weights.name_map import FAMILY_RULES, all_hugging_face_names, rules_for

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "max_position_embeddings": 256,
}
"""All that config.json must say. 32 heads: a multiple of the 32 key-value heads that Qwen takes by default."""


def architecture(family: str) -> str:
    return FAMILIES[family][1].__name__


def write_config(folder: Path, family: str, **values: Any) -> Path:
    """A folder with a config.json of `SIZES` and `values`."""
    config = {"architectures": [architecture(family)], "model_type": family} | SIZES | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_family_has_rules_and_is_tested() -> None:
    assert {family.name for family in ARCHITECTURES.values()} == set(FAMILY_RULES) == set(FAMILIES)
    assert {family: architecture(family) for family in FAMILIES} == {f.name: a for a, f in ARCHITECTURES.items()}


STATED: dict[str, dict[str, Any]] = {
    "nothing but sizes": {},
    "grouped heads": {"num_key_value_heads": 4},
    "null is as many as query heads": {"num_key_value_heads": None},
    "head_dim": {"head_dim": 8},
    "eps": {"rms_norm_eps": 1e-5},
    "rope of version 4": {"rope_theta": 1e6, "rope_scaling": None},
    "rope of version 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "old rope_scaling wins": {
        "rope_scaling": {"type": "default", "rope_theta": 7e5},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "rope_parameters beside rope_theta": {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 5e5}},
    "rope_parameters without theta": {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}},
    "tied": {"tie_word_embeddings": True},
    "window not in use": {"sliding_window": 128, "max_window_layers": 1, "use_sliding_window": False},
}


@pytest.mark.parametrize("stated", STATED.values(), ids=STATED.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_dims_are_what_transformers_reads(family: str, stated: dict[str, Any], tmp_path: Path) -> None:
    dims = read_model_dims(write_config(tmp_path, family, **stated))
    reference = AutoConfig.from_pretrained(tmp_path)
    assert dims.family == family
    assert dims.num_heads == reference.num_attention_heads
    assert dims.num_kv_heads == reference.num_key_value_heads
    # Qwen2's configuration has no head_dim; its model then divides.
    assert dims.head_dim == getattr(reference, "head_dim", reference.hidden_size // reference.num_attention_heads)
    assert dims.rms_norm_eps == reference.rms_norm_eps
    assert dims.rope_theta == reference.rope_parameters["rope_theta"]
    assert dims.tied_embeddings == reference.tie_word_embeddings
    assert dims.max_positions == reference.max_position_embeddings
    assert reference.hidden_act == "silu", "what a config.json without hidden_act means"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_holds_exactly_the_tensors_of_its_rules(family: str, tied: bool, tmp_path: Path) -> None:
    folder = make_model(family, tmp_path, 0, tied=tied)
    checkpoint = check_checkpoint("models.student", folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(all_hugging_face_names(checkpoint.dims))
    names = rules_for(checkpoint.dims)
    assert (
        ("decoder.layers.1.self_attention.linear_qkv.bias" in names) == checkpoint.dims.qkv_bias == (family == "qwen2")
    )
    for part in "qk":
        assert (f"decoder.layers.1.self_attention.{part}_layernorm.weight" in names) == checkpoint.dims.qk_norm
    assert checkpoint.dims.qk_norm == (family == "qwen3")


@pytest.mark.parametrize(("claimed", "actual"), itertools.permutations(FAMILIES, 2))
def test_a_checkpoint_of_another_family_is_refused(claimed: str, actual: str, tmp_path: Path) -> None:
    folder = make_model(actual, tmp_path, 0)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [architecture(claimed)]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"tensor .*self_attn.*(is missing|is not known to the {claimed} family)"):
        check_checkpoint("models.student", folder)


ANY = tuple(FAMILIES)
QWEN = ("qwen2", "qwen3")
REFUSED: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (QWEN, {"use_sliding_window": True}, "use_sliding_window = true is not supported yet"),
    (QWEN, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
    (("llama", "qwen3"), {"attention_bias": True}, "attention_bias = true is not supported yet"),
    (("llama",), {"mlp_bias": True}, "mlp_bias = true is not supported yet"),
    (ANY, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; must be 'silu'"),
    (ANY, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported yet"),
    (ANY, {"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3' is not supported yet"),
    (ANY, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters by layer type"),
    (ANY, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    (ANY, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not supported"),
    (ANY, {"quantization_config": {"quant_method": "fp8"}}, "quantised weights are not supported"),
    (QWEN, {"dual_chunk_attention_config": {"chunk_size": 64}}, "dual_chunk_attention_config is not supported"),
    (ANY, {"num_key_value_heads": 5}, "num_attention_heads = 32: must be a multiple of num_key_value_heads = 5"),
    (ANY, {"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM is not supported; must be one of Llama"),
]


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [(family, values, message) for families, values, message in REFUSED for family in families],
)
def test_what_would_compute_otherwise_is_refused(family: str, values: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_model_dims(write_config(tmp_path, family, **values))
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_size_has_no_default(family: str, key: str, tmp_path: Path) -> None:
    """transformers has one for each: the sizes of a 7B model, which no checkpoint without the key means."""
    folder = write_config(tmp_path, family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
    with pytest.raises(UserError, match=f"key {key} is missing"):
        read_model_dims(folder)
