"""Reading a Hugging Face checkpoint's `config.json` and `generation_config.json`, without loading any model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_npd.errors import UserError

FAMILIES = {"LlamaForCausalLM": "llama"}
"""Architecture named by a checkpoint -> family with a name map in `weights/`."""


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

    def padded_kv_heads(self, tensor_model_parallel_size: int) -> int:
        """Key-value heads (each with its query heads) when split over ranks: the next multiple of their number.

        The added heads have zero weights: their values and output columns are zero, so they add nothing to any
        activation, receive zero gradients, and stay zero. Checkpoints never contain them. This lets SmolLM2 (9
        heads, 3 key-value heads) train at TP 2.
        """
        return -(-self.num_kv_heads // tensor_model_parallel_size) * tensor_model_parallel_size


def read_model_dims(folder: str | Path) -> ModelDims:
    """Dimensions of the checkpoint in `folder`.

    Raises:
        UserError: no readable config.json, a family without a name map, or a feature no role supports.
    """
    raw = _read_json(Path(folder) / "config.json")
    architecture = (raw.get("architectures") or ["none"])[0]
    where = f"{folder}/config.json"
    if architecture not in FAMILIES:
        raise UserError(f"{where}: architecture {architecture} is not supported; must be one of {', '.join(FAMILIES)}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UserError(f"{where}: rope_type {rope_type!r} is not supported yet; must be 'default'")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise UserError(f"{where}: {key} = true is not supported yet for {architecture}")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act = {raw['hidden_act']!r} is not supported; must be 'silu'")
    try:
        heads = raw["num_attention_heads"]
        return ModelDims(
            family=FAMILIES[architecture],
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
            max_positions=raw["max_position_embeddings"],
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise UserError(f"{where}: key {error.args[0]} is missing") from None


def eos_token_ids(folder: str | Path) -> list[int]:
    """Ids that end a response: `eos_token_id` of the generation config, else of the config.

    Raises:
        UserError: neither file names one.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if path.is_file() and (value := _read_json(path).get("eos_token_id")) is not None:
            return [int(token) for token in (value if isinstance(value, list) else [value])]
    raise UserError(f"{folder}: no eos_token_id in generation_config.json or config.json; responses could not end")


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
