"""What belongs to a Hugging Face checkpoint beside its weights: configuration, tokenizer, generation config."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_npd.versions.manifest import MANIFEST, PARITY

WEIGHT_FILES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".gguf",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
)
"""How names of files with weights, and of their indices, end."""


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files of one checkpoint folder into another as they are, but no weights. Nothing in them is run.

    Sub-folders stay behind: publishers put weights of other formats there. So do the manifest and the parity probe of a
    published version, which speak of its very weights.
    """
    target.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHT_FILES) and file.name not in (MANIFEST, PARITY):
            shutil.copyfile(file, target / file.name)
