"""Tiny random checkpoints of every family for tests: real files, clearly different distributions, made in no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_npd.files import write_json
from megatron_npd.versions.manifest import PARITY, write_manifest

EOS = 2
VOCAB_SIZE = 128
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    # transformers does not know it; it is Llama with attention_bias, under other names (see `_rename_to_openpangu`).
    "openpangu": (LlamaConfig, LlamaForCausalLM),
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "openpangu": "PanguEmbeddedForCausalLM",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""A scaling (rope_parameters of `make_llama`) that changes every kind of wavelength of 32 dimensions."""


def make_model(
    family: str,
    folder: Path,
    seed: int,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    split: bool = False,
    initializer_range: float = 0.15,
    **overrides: Any,
) -> Path:
    """Write a Hugging Face checkpoint of about 60 thousand parameters and return its folder.

    Two layers, hidden 64, two heads of 32 (vLLM's CPU attention crashes below), end token `EOS`. Biases are not zero
    and norm weights not one, so that a forgotten tensor shows. `split` spreads the weights over several files, as
    pipeline stages do; `overrides` are further fields of the family's transformers configuration.
    """
    fields = (
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 256,
            "initializer_range": initializer_range,
        }
        | ({"attention_bias": True} if family == "openpangu" else {})
        | overrides
    )
    config_class, model_class = FAMILIES[family]
    config = config_class(**fields, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=EOS, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        _randomise_vectors(model, 2 * initializer_range)
    model = model.to(dtype)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=EOS)
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=total // 2 if split else total + 1)
    if family == "openpangu":
        _rename_to_openpangu(folder / "config.json")
    return folder


def make_llama(folder: Path, seed: int, **options: Any) -> Path:
    """`make_model` for tests that hold for any family."""
    return make_model("llama", folder, seed, **options)


def hf_logprobs(folder: Path, sequences: list[list[int]]) -> list[list[float]]:
    """Hugging Face's log p(token t | tokens before t) for t >= 1, nats, in the checkpoint's dtype."""
    model = AutoModelForCausalLM.from_pretrained(for_transformers(folder)).eval()
    return [_logprobs(model, sequence) for sequence in sequences]


def for_transformers(folder: Path) -> Path:
    """A folder of the same weights that transformers can load: openPangu's is the Llama with attention_bias it is."""
    raw = json.loads((folder / "config.json").read_text())
    if raw["model_type"] != "PanguEmbedded":
        return folder
    twin = folder.with_name(f".{folder.name}_as_llama")
    twin.mkdir(exist_ok=True)
    for file in folder.glob("*.safetensors*"):
        (twin / file.name).unlink(missing_ok=True)
        (twin / file.name).symlink_to(file)
    raw |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": raw.pop("bias")}
    (twin / "config.json").write_text(json.dumps(raw))
    return twin


def publish(folder: Path, version: int, probe_seed: int = 0) -> Path:
    """Make a checkpoint folder a published version: parity.json from Hugging Face's logprobs, then version.json."""
    sequences = probe_sequences(probe_seed)
    write_json(folder / PARITY, {"sequences": sequences, "logprobs": hf_logprobs(folder, sequences)})
    write_manifest(folder, version)
    return folder


def probe_sequences(seed: int = 0, count: int = 3, length: int = 12) -> list[list[int]]:
    """Random token sequences, without the end token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (count, length), generator=generator).tolist()


def _rename_to_openpangu(path: Path) -> None:
    """Turn a Llama's config.json into what released openPangu-Embedded checkpoints have."""
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    bias = raw.pop("attention_bias")
    for key in ("head_dim", "mlp_bias", "pretraining_tp"):  # head_dim is hidden size / heads there
        raw.pop(key, None)
    raw |= {"architectures": [ARCHITECTURES["openpangu"]], "model_type": "PanguEmbedded", "bias": bias}
    path.write_text(json.dumps(raw | {"rope_theta": rope["rope_theta"]}))


@torch.no_grad()
def _logprobs(model: PreTrainedModel, sequence: list[int]) -> list[float]:
    logits_TV = model(torch.tensor([sequence])).logits[0, :-1].float()
    targets_T1 = torch.tensor(sequence[1:])[:, None]
    return logits_TV.log_softmax(-1).gather(1, targets_T1)[:, 0].tolist()


@torch.no_grad()
def _randomise_vectors(model: PreTrainedModel, spread: float) -> None:
    """Move biases (0 in transformers) and norm weights (1) by normal noise of standard deviation `spread`."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += spread * torch.randn_like(parameter)
