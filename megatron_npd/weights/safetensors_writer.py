"""Writing a Hugging Face checkpoint's weight files tensor by tensor.

safetensors' own `save_file` needs all tensors of a file in memory at once, which for a 5 GB file is 5 GB. The format
needs no more than the shapes beforehand: an 8-byte length, a JSON header that gives every tensor's data type, shape and
place, and the tensors' bytes one after another. So files are planned from shapes alone, and written from tensors that
come one at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_npd.files import fsync_folder, write_json
from megatron_npd.models.hf_checkpoint import INDEX
from megatron_npd.safetensors_format import make_header
from megatron_npd.weights.tensor_file import DTYPE_NAMES


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before it exists."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """One file to write, and its tensors in their order."""

    file: str
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def header(self) -> bytes:
        """All that comes before the first tensor's bytes."""
        listed = ((tensor.name, DTYPE_NAMES[tensor.dtype], tensor.shape, tensor.nbytes) for tensor in self.tensors)
        return make_header(listed, {"format": "pt"})


def plan_files(tensors: Sequence[TensorSpec], max_bytes: int) -> list[PlannedFile]:
    """Files of at most `max_bytes` of tensors each, in the order given; a larger tensor has a file of its own.

    Named as transformers does: model-00001-of-00003.safetensors, or model.safetensors if it is the only one.
    """
    files: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    shards = []
    for number, content in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        # Wide ones first, for alignment where data types are mixed.
        shards.append(PlannedFile(name, tuple(sorted(content, key=lambda tensor: -tensor.dtype.itemsize))))
    return shards


def is_written(folder: Path, shard: PlannedFile) -> bool:
    """Whether `folder` has this very file: same header, whole length."""
    path, header = folder / shard.file, shard.header
    if not path.is_file() or path.stat().st_size != len(header) + shard.nbytes:
        return False
    with open(path, "rb") as stream:
        return stream.read(len(header)) == header


def write_file(folder: Path, shard: PlannedFile, tensor: Callable[[str], torch.Tensor]) -> None:
    """Write one file durably; it has its name when it is whole. `tensor` gives each when its turn comes."""
    unfinished = folder / f".{shard.file}.tmp"
    with open(unfinished, "wb", buffering=0) as stream:
        _write_all(stream.fileno(), memoryview(shard.header))
        for spec in shard.tensors:
            value = tensor(spec.name).contiguous()
            assert (tuple(value.shape), value.dtype) == (spec.shape, spec.dtype), f"{spec}, not {value.shape}"
            if value.numel():
                _write_all(stream.fileno(), memoryview(value.view(-1).view(torch.uint8).numpy()))
            del value  # before the next one is made
        os.fsync(stream.fileno())
    os.rename(unfinished, folder / shard.file)
    fsync_folder(folder)


def write_index(folder: Path, shards: Sequence[PlannedFile]) -> None:
    """Say which file holds which tensor; where there is only one, nothing needs to be said."""
    if len(shards) > 1:
        weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
        total = sum(shard.nbytes for shard in shards)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_all(descriptor: int, data: memoryview) -> None:
    """One call writes at most 2 GB."""
    while data:
        data = data[os.write(descriptor, data) :]
