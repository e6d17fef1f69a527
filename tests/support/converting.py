"""What the tests of the conversion tool share: running it in this process, and looking at checkpoints."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from places import TOOLS
from safetensors.torch import load_file

AWKWARD = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "vocab_size": 131}
"""Three key-value groups and 131 rows: TP 2 and 4 pad both."""


@functools.cache
def tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def convert(*arguments: object) -> int:
    """Run tools/convert_checkpoint.py here, where Megatron is imported once; its exit status."""
    return tool("convert_checkpoint").main([str(argument) for argument in arguments])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face checkpoint, by safetensors' own reader."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_model(folder: Path, original: Path) -> None:
    """The same tensors to the last bit, and every other file as it was."""
    found, expected = weights(folder), weights(original)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    for file in original.glob("*.json"):
        if "safetensors" not in file.name:
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
