"""Every family from its config.json alone: transformers' own defaults; what would compute otherwise is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import ARCHITECTURES, FAMILIES, LLAMA3_ROPE, make_model
from transformers import AutoConfig

from megatron_npd.errors import UserError
from megatron_npd.models.families import FAMILIES as KNOWN
from megatron_npd.models.hf_checkpoint import check_checkpoint
from megatron_npd.models.hf_config import RopeScaling, read_model_dims
from megatron_npd.models.tensor_map import all_hugging_face_names, parameter_map

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "max_position_embeddings": 256,
}
"""All that config.json must say. 32 heads: a multiple of the 32 key-value heads that Qwen takes by default."""


def write_config(folder: Path, family: str, **values: Any) -> Path:
    """A folder with a config.json of `SIZES` and `values`."""
    config = {"architectures": [ARCHITECTURES[family]], "model_type": family} | SIZES | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_family_is_tested() -> None:
    assert {family.name: architecture for architecture, family in KNOWN.items()} == ARCHITECTURES
    assert set(FAMILIES) == set(ARCHITECTURES)


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
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"openpangu"}))
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


OPENPANGU_7B = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig"},
    "bias": True,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12800,
    "max_position_embeddings": 32768,
    "model_type": "PanguEmbedded",
    "num_attention_heads": 32,
    "num_hidden_layers": 34,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 16000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 153376,
}
"""What the released openPangu-Embedded-7B says, special tokens and bookkeeping left out."""


def test_openpangu_reads_as_released(tmp_path: Path) -> None:
    """transformers does not know this family: the sizes are method.md's."""
    (tmp_path / "config.json").write_text(json.dumps(OPENPANGU_7B))
    dims = read_model_dims(tmp_path)
    assert (dims.vocab_size, dims.hidden_size, dims.intermediate_size, dims.num_layers) == (153376, 4096, 12800, 34)
    assert (dims.num_heads, dims.num_kv_heads, dims.head_dim, dims.max_positions) == (32, 8, 128, 32768)
    assert (dims.rms_norm_eps, dims.rope_theta, dims.rope_scaling, dims.tied_embeddings) == (1e-5, 16e6, None, False)
    assert dims.qkv_bias and dims.output_bias and not dims.qk_norm


@pytest.mark.parametrize("removed", ["bias", "num_key_value_heads", "rms_norm_eps", "rope_theta", "hidden_act"])
def test_openpangus_defaults_are_those_of_its_configuration_class(removed: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OPENPANGU_7B))
    whole = read_model_dims(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in OPENPANGU_7B.items() if k != removed}))
    assert read_model_dims(tmp_path) == whole


BIASES = {
    ("llama", False): (False, False),
    ("llama", True): (True, True),
    ("openpangu", False): (False, False),
    ("openpangu", True): (True, True),
}


@pytest.mark.parametrize(("family", "switch"), BIASES)
def test_attention_bias_is_of_all_four_projections(family: str, switch: bool, tmp_path: Path) -> None:
    key = "bias" if family == "openpangu" else "attention_bias"
    dims = read_model_dims(write_config(tmp_path, family, **{key: switch}))
    assert (dims.qkv_bias, dims.output_bias) == BIASES[family, switch]
    names = set(all_hugging_face_names(dims))
    for part in "qkvo":
        assert (f"model.layers.1.self_attn.{part}_proj.bias" in names) == switch


SCALINGS: list[dict[str, Any]] = [
    LLAMA3_ROPE,
    LLAMA3_ROPE | {"factor": 8.0, "low_freq_factor": 0.5, "original_max_position_embeddings": 128},
    {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e5},
    {"type": "linear", "factor": 2.0},
]


@pytest.mark.parametrize("rope", SCALINGS)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_scaled_frequencies_are_transformers(rope: dict[str, Any], head_dim: int, tmp_path: Path) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from megatron_npd.mcore.rotary import inverse_frequencies

    dims = read_model_dims(write_config(tmp_path, "llama", rope_scaling=rope, rope_theta=1e4, head_dim=head_dim))
    reference = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path)).inv_freq
    torch.testing.assert_close(inverse_frequencies(dims), reference, rtol=3e-7, atol=0)
    plain = inverse_frequencies(dataclasses.replace(dims, rope_scaling=None))
    assert not torch.allclose(reference, plain), "this scaling changes nothing"


def test_llama3_takes_the_models_positions_where_the_original_ones_are_not_given(tmp_path: Path) -> None:
    rope = {key: value for key, value in LLAMA3_ROPE.items() if key != "original_max_position_embeddings"}
    dims = read_model_dims(write_config(tmp_path, "llama", rope_scaling=rope))
    assert dims.rope_scaling == RopeScaling("llama3", 4.0, 1.0, 4.0, SIZES["max_position_embeddings"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_holds_exactly_the_tensors_of_its_rules(family: str, tied: bool, tmp_path: Path) -> None:
    folder = make_model(family, tmp_path, 0, tied=tied)
    checkpoint = check_checkpoint("models.student", folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(all_hugging_face_names(checkpoint.dims))
    names = parameter_map(checkpoint.dims)
    qkv_bias, output_bias = family in ("qwen2", "openpangu"), family == "openpangu"
    assert ("decoder.layers.1.self_attention.linear_qkv.bias" in names) == checkpoint.dims.qkv_bias == qkv_bias
    assert ("decoder.layers.1.self_attention.linear_proj.bias" in names) == checkpoint.dims.output_bias == output_bias
    for part in "qk":
        assert (f"decoder.layers.1.self_attention.{part}_layernorm.weight" in names) == checkpoint.dims.qk_norm
    assert checkpoint.dims.qk_norm == (family == "qwen3")


@pytest.mark.parametrize(("claimed", "actual"), itertools.permutations(FAMILIES, 2))
def test_a_checkpoint_of_another_family_is_refused(claimed: str, actual: str, tmp_path: Path) -> None:
    folder = make_model(actual, tmp_path, 0)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [ARCHITECTURES[claimed]]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"tensor .*self_attn.*(is missing|is not known to the {claimed} family)"):
        check_checkpoint("models.student", folder)


ANY = tuple(FAMILIES)
QWEN = ("qwen2", "qwen3")
REFUSED: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (QWEN, {"use_sliding_window": True}, "use_sliding_window = true is not supported yet"),
    (QWEN, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
    (("qwen3",), {"attention_bias": True}, "attention_bias = true is not supported yet"),
    (("llama", "openpangu"), {"mlp_bias": True}, "mlp_bias = true is not supported yet"),
    (ANY, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; must be 'silu'"),
    (ANY, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
    (ANY, {"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3' needs the key factor, which is missing"),
    (ANY, {"rope_scaling": {"type": "linear", "factor": -1}}, "factor = -1.0 of rope_type 'linear'; must be positive"),
    (ANY, {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 0.5}}, "low_freq_factor = 1.0 .* below high_freq_factor"),
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
