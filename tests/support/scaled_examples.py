"""The examples for tests: the released models' dimensions, and the same runs with tiny models of the same families."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from inputs import Inputs, write_prompts
from places import EXAMPLES

NAMES = sorted(folder.name for folder in EXAMPLES.iterdir() if (folder / "run.toml").is_file())
EOS = 2


def _llama_like(
    architecture: str, kind: str, hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any
) -> Any:
    return {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "rms_norm_eps": 1e-6,
        "eos_token_id": EOS,
    } | more


def _pangu(hidden: int, inner: int, layers: int, heads: int, kv: int, tied: bool, theta: float) -> Any:
    more = {"vocab_size": 153376, "max_position_embeddings": 32768, "bias": True, "rope_theta": theta}
    more |= {"tie_word_embeddings": tied}
    return _llama_like("PanguEmbeddedForCausalLM", "PanguEmbedded", hidden, inner, layers, heads, kv, **more)


def _qwen2(hidden: int, inner: int, heads: int, kv: int, tied: bool, vocabulary: int, positions: int) -> Any:
    more = {"vocab_size": vocabulary, "max_position_embeddings": positions, "tie_word_embeddings": tied}
    return _llama_like("Qwen2ForCausalLM", "qwen2", hidden, inner, 28, heads, kv, rope_theta=1e6, **more)


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> Any:
    more = {"vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": tied, "head_dim": 128}
    return _llama_like("Qwen3ForCausalLM", "qwen3", hidden, inner, layers, heads, 8, rope_theta=1e6, **more)


RELEASED = {
    "openPangu-Embedded-1B": _pangu(1536, 6144, 26, 12, 6, True, 4e6),
    "openPangu-Embedded-7B": _pangu(4096, 12800, 34, 32, 8, False, 16e6),
    "openPangu-72B": _pangu(8192, 28672, 80, 64, 8, False, 16e6),  # of no release: see the example's README
    "Qwen2.5-Math-7B-Instruct": _qwen2(3584, 18944, 28, 4, False, 152064, 4096),
    "Qwen2.5-Math-1.5B": _qwen2(1536, 8960, 12, 2, True, 151936, 4096),
    "Qwen2.5-Coder-7B-Instruct": _qwen2(3584, 18944, 28, 4, False, 152064, 32768),
    "Qwen2.5-Coder-1.5B": _qwen2(1536, 8960, 12, 2, True, 151936, 32768),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, True),
}
"""config.json of each model of the examples, as far as it says anything about shapes."""

FAMILY = {"PanguEmbeddedForCausalLM": "openpangu", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


def read(name: str) -> dict[str, Any]:
    """An example's configuration as it is."""
    return tomllib.loads((EXAMPLES / name / "run.toml").read_text(encoding="utf-8"))


def download_without_weights(name: str, folder: Path) -> None:
    """What an example's README has one download before the weights, below `folder`; the tokenizer is a small one."""
    from tiny_tokenizer import make_tokenizer

    values = read(name)
    for role in ("teacher", "student"):
        model = folder / values["models"][role]
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(RELEASED[model.name]))
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
        make_tokenizer(model)
    prompts = {split: folder / values["prompts"][split] for split in ("train", "heldout")}
    prompts["train"].parent.mkdir(parents=True, exist_ok=True)
    write_prompts(prompts["train"], {f"t{i}": f"What is {i} plus {i}?" for i in range(4)})
    write_prompts(prompts["heldout"], {f"h{i}": f"Name {i} things." for i in range(3)})


def scaled_down(name: str, root: Path) -> Inputs:
    """An example with tiny models of the same families, and everything else that is measured in tokens smaller.

    The recipe stays: rounds, epochs, refresh, λ, k, τ, the loss. So does the trainer's kind of layout, on two ranks.
    Both models get the same number of embedding rows: a random teacher would sample padding, which a real one hardly
    ever does.
    """
    from tiny_models import make_model
    from tiny_tokenizer import make_tokenizer

    inputs = Inputs(root)
    values = read(name)
    for seed, (role, folder) in enumerate((("teacher", inputs.teacher), ("student", inputs.student))):
        released = RELEASED[Path(values["models"][role]).name]
        make_model(
            FAMILY[released["architectures"][0]], folder, seed, tied=released["tie_word_embeddings"],
            num_hidden_layers=2 - seed, initializer_range=0.05,
        )  # fmt: skip
        make_tokenizer(folder)
    write_prompts(inputs.train, {f"t{i}": f"What is {i} plus {i}?" for i in range(24)})
    training, annotator = values["training"], values["annotator"]
    small = {
        "run_directory": str(inputs.run),
        "models": {"teacher": str(inputs.teacher), "student": str(inputs.student), "dtype": "float32"},
        "prompts": {"train": str(inputs.train), "heldout": str(inputs.heldout), "max_prompt_tokens": 64},
        "rollout": {"max_new_tokens": 24, "samples_per_unit": 4, "kv_cache_gib": 0.05, "threads": 1},
        "annotator": annotator
        | {"pack_length": 128, "threads": 1, "tensor_model_parallel_size": min(annotator.get(TENSOR, 1), 2)},
        "selection": values["selection"] | {"reject_truncated": False},  # random models rarely end by themselves
        "training": training
        | {"sequence_length": 128, "global_batch_size": 2, "checkpoint_interval": 10}
        | {"data_parallel_size": 2 // training.get(TENSOR, 1)},
    }
    inputs.values = values | small
    return inputs


TENSOR = "tensor_model_parallel_size"
