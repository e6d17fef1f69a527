"""What one rank writes of a version, in the background of training: files of its buckets, from host memory.

Plain functions without communication. When its files are durable a rank says so in a small file of its own, by which
`weights.completion` knows what there is without reading it again.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_npd.files import fsync_folder, read_json, with_file_name, write_json
from megatron_npd.versions.manifest import PARITY, ParityProbe, WeightFile
from megatron_npd.weights.safetensors_writer import PlannedFile
from megatron_npd.weights.tensor_file import DTYPE_NAMES

SHARES = ".shares"
"""Folder of what the ranks say, inside the version's staging folder."""
CHUNK = 8 * 2**20
"""Bytes hashed and written at a time."""


@dataclass(frozen=True)
class Share:
    """What one rank writes."""

    rank: int
    files: list[tuple[PlannedFile, torch.Tensor]]
    """A safetensors file, and the bytes behind its header: uint8 [shard.nbytes]."""
    probe: ParityProbe | None = None


def write_share(staging: Path, share: Share) -> None:
    """Write a rank's files into the version's staging folder, durably, and say so.

    Raises:
        OSError: with the file's name.
    """
    written = {shard.file: write_weights(staging, shard, data) for shard, data in share.files}
    if share.probe is not None:
        with with_file_name(staging / PARITY):
            write_json(staging / PARITY, asdict(share.probe))
    receipt = _receipt(staging, share.rank)
    with with_file_name(receipt):
        fsync_folder(staging)
        write_json(receipt, {name: asdict(file) for name, file in written.items()})


def read_share(staging: Path, rank: int) -> dict[str, WeightFile] | None:
    """The weight files a rank wrote, by name; None while it has not said so."""
    receipt = _receipt(staging, rank)
    if not receipt.exists():
        return None
    files = {}
    for name, entry in read_json(receipt).items():
        tensors = {key: (dtype, tuple(shape)) for key, (dtype, shape) in entry["tensors"].items()}
        files[name] = WeightFile(entry["size"], entry["sha256"], tensors)
    return files


def write_weights(folder: Path, shard: PlannedFile, data: torch.Tensor) -> WeightFile:
    """Write one safetensors file, durably, hashing on the way what is written."""
    path, header, content = folder / shard.file, shard.header, memoryview(data.numpy())
    digest = hashlib.sha256(header)
    with with_file_name(path), open(path, "xb") as file:
        file.write(header)
        for start in range(0, len(content), CHUNK):
            chunk = content[start : start + CHUNK]
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    tensors = {spec.name: (DTYPE_NAMES[spec.dtype], spec.shape) for spec in shard.tensors}
    return WeightFile(len(header) + len(content), digest.hexdigest(), tensors)


def _receipt(staging: Path, rank: int) -> Path:
    return staging / SHARES / f"rank_{rank:05d}.json"
