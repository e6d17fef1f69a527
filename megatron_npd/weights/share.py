"""What one rank writes of a version, in the background of training: files of its buckets, from host memory.

Plain functions without communication. When its files are durable a rank says so in a small file of its own, by which
`weights.completion` knows what there is without reading it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_npd.run_directory import fsync_folder, read_json, write_json
from megatron_npd.versions.manifest import PARITY, ParityProbe, WeightFile
from megatron_npd.weights.safetensors_writer import Shard
from megatron_npd.weights.source import DTYPES

SHARES = ".shares"
"""Folder of what the ranks say, inside the version's staging folder."""
CHUNK = 8 * 2**20
"""Bytes hashed and written at a time."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Share:
    """What one rank writes."""

    rank: int
    files: list[tuple[Shard, torch.Tensor]]
    """A safetensors file, and the bytes behind its header: uint8 [shard.nbytes]."""
    probe: ParityProbe | None = None


def write_share(staging: Path, share: Share) -> None:
    """Write a rank's files into the version's staging folder, durably, and say so.

    Raises:
        OSError: with the file's name.
    """
    written = {shard.file: write_weights(staging, shard, data) for shard, data in share.files}
    if share.probe is not None:
        with naming(staging / PARITY):
            write_json(staging / PARITY, asdict(share.probe))
    said = _said(staging, share.rank)
    with naming(said):
        fsync_folder(staging)
        write_json(said, {name: asdict(file) for name, file in written.items()})


def read_share(staging: Path, rank: int) -> dict[str, WeightFile] | None:
    """The weight files a rank wrote, by name; None while it has not said so."""
    said = _said(staging, rank)
    if not said.exists():
        return None
    files = {}
    for name, entry in read_json(said).items():
        tensors = {key: (dtype, tuple(shape)) for key, (dtype, shape) in entry["tensors"].items()}
        files[name] = WeightFile(entry["size"], entry["sha256"], tensors)
    return files


def write_weights(folder: Path, shard: Shard, data: torch.Tensor) -> WeightFile:
    """Write one safetensors file, durably, hashing on the way what is written."""
    path, header, content = folder / shard.file, shard.header, memoryview(data.numpy())
    digest = hashlib.sha256(header)
    with naming(path), open(path, "xb") as file:
        file.write(header)
        for start in range(0, len(content), CHUNK):
            chunk = content[start : start + CHUNK]
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    tensors = {spec.name: (_DTYPE_NAMES[spec.dtype], spec.shape) for spec in shard.tensors}
    return WeightFile(len(header) + len(content), digest.hexdigest(), tensors)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of the system a file name where they have none (as when a disk is full)."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _said(staging: Path, rank: int) -> Path:
    return staging / SHARES / f"rank_{rank:05d}.json"
