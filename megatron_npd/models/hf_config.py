"""Reading a Hugging Face checkpoint's `config.json` and `generation_config.json`, without loading any model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_npd.errors import UserError
from megatron_npd.models.families import FAMILIES
from megatron_npd.models.families.family import AttentionBias, Family


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies other than rope_theta alone gives: what transformers calls `linear` and `llama3`."""

    rope_type: str
    factor: float
    """linear: every frequency is divided by it; llama3: those of wavelengths past the original positions are."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original_max_positions / this are scaled in full."""
    high_freq_factor: float = 1.0
    """llama3: wavelengths shorter than original_max_positions / this are not scaled."""
    original_max_positions: int = 0
    """llama3: positions the model was pretrained with."""


@dataclass(frozen=True)
class ModelDims:
    """Everything that decides a model's shape and arithmetic."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    tied_embeddings: bool
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    """The q, k and v projections have biases. The MLP never has."""
    output_bias: bool = False
    """The attention's output projection has one as well."""
    qk_norm: bool = False
    """RMSNorm with `rms_norm_eps` over the head_dim of each query and key head, before rotary embedding. Its two
    weights [head_dim] are shared by all heads of a layer."""
    more_rows: int = 0
    """Rows that the embedding and the head have in memory after those of the checkpoint, zero and in no softmax: so
    that two models of different vocab_size are cut over ranks at the same ids."""

    @property
    def rows(self) -> int:
        """Rows of the embedding and of the head in memory, but for what makes them divide over ranks."""
        return self.vocab_size + self.more_rows

    def padded_kv_heads(self, tensor_model_parallel_size: int) -> int:
        """Key-value heads (each with its query heads) when split over ranks: the next multiple of their number.

        The added heads have zero weights and biases: their values and output columns are zero, so they add nothing to
        any activation, receive zero gradients, and stay zero. Checkpoints never contain them. This lets SmolLM2 (9
        heads, 3 key-value heads) train at TP 2.
        """
        return -(-self.num_kv_heads // tensor_model_parallel_size) * tensor_model_parallel_size


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding over all ranks: the next multiple of the tensor-parallel size."""
    return -(-vocab_size // tensor_model_parallel_size) * tensor_model_parallel_size


def read_model_dims(folder: str | Path) -> ModelDims:
    """Dimensions of the checkpoint in `folder`. Sizes must be in config.json; other keys have transformers' defaults.

    Raises:
        UserError: no readable config.json, a family without a name map, or a feature no role supports.
    """
    return model_dims(_read_json(Path(folder) / "config.json"), f"{folder}/config.json")


def model_dims(raw: dict[str, Any], where: str) -> ModelDims:
    """`read_model_dims` of the content of a config.json; `where` names it in messages."""
    family = _family(raw, where)
    raw = {key: value for key, value in raw.items() if value is not None or key == "num_key_value_heads"}
    _check_supported(raw, family, where)
    try:
        heads = raw["num_attention_heads"]
        qkv_bias, output_bias = _attention_biases(raw, family.bias)
        dims = ModelDims(
            family=family.name,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads", family.num_kv_heads) or heads,
            head_dim=raw.get("head_dim") or family.head_dim or raw["hidden_size"] // heads,
            rms_norm_eps=float(raw.get("rms_norm_eps", family.rms_norm_eps)),
            rope_theta=float(_rope(raw).get("rope_theta") or raw.get("rope_theta") or family.rope_theta),
            max_positions=raw["max_position_embeddings"],
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            rope_scaling=_rope_scaling(raw, where),
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            qk_norm=family.qk_norm,
        )
    except KeyError as error:
        raise UserError(f"{where}: key {error.args[0]} is missing") from None
    if dims.num_heads % dims.num_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads = {dims.num_heads}: must be a multiple of num_key_value_heads = "
            f"{dims.num_kv_heads}"
        )
    return dims


def find_family(folder: str | Path) -> Family | None:
    """The family of the checkpoint in `folder`; None without a config.json or with an architecture we do not know."""
    path = Path(folder) / "config.json"
    architectures = (_read_json(path).get("architectures") if path.is_file() else None) or ["none"]
    return FAMILIES.get(architectures[0])


def eos_token_ids(folder: str | Path) -> list[int]:
    """Ids that end a response: `eos_token_id` of the generation config, else (absent or null) of the config.

    Raises:
        UserError: neither file names one, or what it names is not an id or a list of ids.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if path.is_file() and (value := _read_json(path).get("eos_token_id")) is not None:
            ids = value if isinstance(value, list) else [value]
            # An empty list would mean that no response ever ends. type: true is an int in Python, no id.
            if not ids or any(type(token) is not int or token < 0 for token in ids):
                raise UserError(f"{path}: eos_token_id = {value!r}: must be a token id, or a list of at least one")
            return list(dict.fromkeys(ids))
    raise UserError(f"{folder}: no eos_token_id in generation_config.json or config.json; responses could not end")


def _family(raw: dict[str, Any], where: str) -> Family:
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise UserError(f"{where}: architecture {architecture} is not supported; must be one of {', '.join(FAMILIES)}")
    return FAMILIES[architecture]


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters under their new or their old name; the old one wins in transformers."""
    return raw.get("rope_scaling") or raw.get("rope_parameters") or {}


ROPE_TYPES = ("default", "linear", "llama3")


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _rope_scaling(raw: dict[str, Any], where: str) -> RopeScaling | None:
    """How the rotary frequencies are scaled; None: not at all.

    Raises:
        UserError: a number is missing, not positive, or llama3's two bounds are in the wrong order.
    """
    rope = _rope(raw)
    rope_type = _rope_type(rope)
    if rope_type == "default":
        return None
    try:
        if rope_type == "linear":
            scaling = RopeScaling(rope_type, float(rope["factor"]))
        else:
            scaling = RopeScaling(
                rope_type,
                float(rope["factor"]),
                float(rope["low_freq_factor"]),
                float(rope["high_freq_factor"]),
                int(rope.get("original_max_position_embeddings") or raw["max_position_embeddings"]),
            )
    except KeyError as error:
        raise UserError(f"{where}: rope_type {rope_type!r} needs the key {error.args[0]}, which is missing") from None
    if scaling.factor <= 0:
        raise UserError(f"{where}: factor = {scaling.factor} of rope_type {rope_type!r}; must be positive")
    if rope_type == "llama3" and not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise UserError(
            f"{where}: low_freq_factor = {scaling.low_freq_factor} of rope_type 'llama3'; must be positive and below "
            f"high_freq_factor = {scaling.high_freq_factor}"
        )
    return scaling


def _attention_biases(raw: dict[str, Any], bias: AttentionBias | None) -> tuple[bool, bool]:
    """Whether the q, k, v projections and whether the output projection have biases."""
    there = bias is not None and (bias.key is None or bool(raw.get(bias.key, bias.default)))
    return there, there and bias.output


def _check_supported(raw: dict[str, Any], family: Family, where: str) -> None:
    """Refuse whatever would make the model compute something other than `ModelDims` says."""
    rope = _rope(raw)
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{where}: rope_parameters by layer type are not supported; must be the same for every layer")
    rope_type = _rope_type(rope)
    if rope_type not in ROPE_TYPES:
        raise UserError(f"{where}: rope_type {rope_type!r} is not supported; must be one of {', '.join(ROPE_TYPES)}")
    rotated = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if rotated != 1.0:
        raise UserError(f"{where}: partial_rotary_factor = {rotated} is not supported; must be 1.0")
    for key in family.must_be_false:
        if raw.get(key):
            raise UserError(f"{where}: {key} = true is not supported yet for {family.name}; must be false")
    windowed = sorted(set(raw.get("layer_types", [])) - {"full_attention"})
    if windowed:
        raise UserError(f"{where}: layer_types has {windowed[0]!r}; every layer must be 'full_attention'")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act = {raw['hidden_act']!r} is not supported; must be 'silu'")
    if raw.get("quantization_config"):
        raise UserError(f"{where}: quantization_config: quantised weights are not supported; must be plain floats")
    if raw.get("dual_chunk_attention_config"):  # Qwen2.5-1M: vLLM follows it, transformers ignores it
        raise UserError(f"{where}: dual_chunk_attention_config is not supported; must be absent")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}; must be a Hugging Face checkpoint folder") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value
