"""Shards: checksummed safetensors files of samples, written atomically, verified on every read.

The file's metadata holds JSON under the key `npd` with the schema version, the kind, and a SHA-256 over that
metadata and every column's name, dtype, shape and bytes. No pickle, no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from megatron_npd.run_directory import fsync_folder, write_atomically
from megatron_npd.schema import COLUMNS, SCHEMA_VERSION

logger = logging.getLogger(__name__)


class CorruptShardError(ValueError):
    """A shard that fails verification: its text says what is wrong with which file."""


@dataclass(frozen=True)
class Shard:
    """Columns of one unit of work (`schema.COLUMNS[kind]`) and free metadata (JSON values)."""

    kind: str
    columns: dict[str, np.ndarray]
    metadata: dict[str, Any]

    def __len__(self) -> int:
        return len(self.columns["prompt_index"])

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    def ragged(self, column: str, row: int, offsets: str) -> np.ndarray:
        """The slice of a ragged column that belongs to sample `row`."""
        bounds = self.columns[offsets]
        return self.columns[column][bounds[row] : bounds[row + 1]]

    def prompt(self, row: int) -> np.ndarray:
        """Prompt token ids of a sample, int32 [P_row]."""
        return self.ragged("prompt_ids", row, "prompt_offsets")

    def response(self, row: int) -> np.ndarray:
        """Response token ids of a sample, int32 [R_row]."""
        return self.ragged("response_ids", row, "response_offsets")


def write_shard(path: Path, shard: Shard) -> None:
    """Write a shard atomically.

    Raises:
        ValueError: columns do not match the schema of the shard's kind (a programming error).
    """
    _check_columns(shard.kind, shard.columns)
    columns = {name: np.ascontiguousarray(column) for name, column in shard.columns.items()}
    header = {"schema_version": SCHEMA_VERSION, "kind": shard.kind, **shard.metadata}
    header["sha256"] = _digest(header, columns)
    write_atomically(path, save(columns, metadata={"npd": json.dumps(header)}))


def read_shard(path: Path, kind: str) -> Shard:
    """Read and verify a shard.

    Raises:
        CorruptShardError: unreadable, of another schema or kind, or the checksum differs.
    """
    content = path.read_bytes()
    try:
        header_length = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + header_length])["__metadata__"]["npd"])
        columns = load(content)
        claimed = header.pop("sha256")
        actual = _digest(header, columns)
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptShardError(f"{path}: not a readable shard ({error})") from None
    if claimed != actual:
        raise CorruptShardError(f"{path}: checksum {actual[:12]} differs from the recorded {str(claimed)[:12]}")
    schema_version, found_kind = header.pop("schema_version"), header.pop("kind")
    if (schema_version, found_kind) != (SCHEMA_VERSION, kind):
        raise CorruptShardError(
            f"{path}: {found_kind} of schema {schema_version}, expected {kind} of schema {SCHEMA_VERSION}"
        )
    try:
        _check_columns(kind, columns)
    except ValueError as error:
        raise CorruptShardError(f"{path}: {error}") from None
    return Shard(kind, columns, header)


def read_or_quarantine(path: Path, kind: str) -> Shard | None:
    """Read a shard, or move a corrupt one aside (`.quarantined`) so that its work is redone; None then."""
    try:
        return read_shard(path, kind)
    except CorruptShardError as error:
        aside = path.with_name(path.name + ".quarantined")
        logger.error("quarantined a shard, its work will be redone: %s -> %s", error, aside.name)
        os.replace(path, aside)
        fsync_folder(path.parent)
        return None


def concatenate_ragged(parts: list[np.ndarray], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Flat values and int64 offsets [len(parts) + 1] of a ragged column."""
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    values = np.concatenate(parts) if parts else np.zeros(0)
    return values.astype(dtype, copy=False), offsets


def _digest(header: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(columns):
        column = columns[name]
        digest.update(f"{name} {column.dtype.str} {column.shape}".encode())
        digest.update(column.tobytes())
    return digest.hexdigest()


def _check_columns(kind: str, columns: Mapping[str, np.ndarray]) -> None:
    """Names, dtypes and consistent dimensions, as `schema.COLUMNS` declares them."""
    expected = COLUMNS[kind]
    if set(columns) != set(expected):
        raise ValueError(f"columns differ from the schema: {sorted(set(columns) ^ set(expected))}")
    sizes: dict[str, int] = {"N+1": len(columns["prompt_index"]) + 1}
    for name, (dtype, dimensions) in expected.items():
        column, letters = columns[name], dimensions.split(",")
        if column.dtype != np.dtype(dtype) or column.ndim != len(letters):
            raise ValueError(f"column {name} is {column.dtype}{column.shape}, expected {dtype}[{dimensions}]")
        for letter, size in zip(letters, column.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"column {name} has {size} rows along {letter}, expected {sizes[letter]}")
    for values, offsets in (("prompt_ids", "prompt_offsets"), ("response_ids", "response_offsets")):
        _check_offsets(offsets, columns[offsets], len(columns[values]))
    if kind == "samples":
        _check_offsets("topk_offsets", columns["topk_offsets"], len(columns["topk_ids"]))


def _check_offsets(name: str, offsets: np.ndarray, total: int) -> None:
    if offsets[0] != 0 or offsets[-1] != total or np.any(np.diff(offsets) < 0):
        raise ValueError(f"column {name} is not a partition of {total} values")
