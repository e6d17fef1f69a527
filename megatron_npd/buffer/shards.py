"""Shards: checksummed safetensors files of samples, written atomically.

The file's metadata holds JSON under the key `npd` with the schema version, the kind, and an XXH3 checksum (128 bits; it
finds damage, it is no defence against a forger) over that metadata and every column's name, dtype, shape and bytes. No
pickle, no torch.

`read_shard` reads and verifies a whole file. `ShardFile` reads single rows of a file that was verified before.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save_file
from xxhash import xxh3_128

from megatron_npd.files import create_atomically, fsync_folder
from megatron_npd.safetensors_format import StoredAs, parse_header
from megatron_npd.schema import COLUMNS, SCHEMA_VERSION

logger = logging.getLogger(__name__)

DTYPES = {"F64": "float64", "F32": "float32", "I64": "int64", "I32": "int32", "U8": "uint8"}
"""safetensors' names of the dtypes that `schema.COLUMNS` uses."""

SMALL_BYTES = 2**20
"""A file of so many bytes is read at once: a training step reads hundreds of rows, six columns of each."""

Placed = tuple[np.dtype, tuple[int, ...], int]
"""dtype, shape, and offset in the file of a column."""


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


def write_shard(path: Path, shard: Shard) -> bool:
    """Write a shard atomically, unless one is there already: redone work never replaces what somebody may have read.

    Returns:
        Whether this shard is now the one at `path`.

    Raises:
        ValueError: columns do not match the schema of the shard's kind (a programming error).
    """
    _check_columns(shard.kind, shard.columns)
    columns = {name: np.ascontiguousarray(column) for name, column in shard.columns.items()}
    header = {"schema_version": SCHEMA_VERSION, "kind": shard.kind, **shard.metadata}
    header["xxh3"] = _digest(header, columns)
    metadata = {"npd": json.dumps(header)}
    created = create_atomically(path, lambda temporary: save_file(columns, temporary, metadata))
    if not created:
        logger.warning("%s: another worker finished it first; this result is dropped", path)
    return created


def read_shard(path: Path, kind: str) -> Shard:
    """Read and verify a shard.

    Raises:
        CorruptShardError: unreadable, of another schema or kind, or the checksum differs.
    """
    content = path.read_bytes()
    try:
        header = json.loads(parse_header(lambda offset, size: content[offset : offset + size]).metadata["npd"])
        columns = load(content)
        claimed = header.pop("xxh3")
        actual = _digest(header, columns)
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptShardError(f"{path}: not a readable shard ({error})") from None
    if claimed != actual:
        raise CorruptShardError(f"{path}: checksum {actual[:12]} differs from the recorded {str(claimed)[:12]}")
    metadata = _metadata(path, kind, header)
    try:
        _check_columns(kind, columns)
    except ValueError as error:
        raise CorruptShardError(f"{path}: {error}") from None
    return Shard(kind, columns, metadata)


class ShardFile:
    """A shard held open, of which single columns and rows are read: whatever is not asked for stays in the file, unless
    that is small (`SMALL_BYTES`): then it is read at once, and stays as it was when it was opened.

    Schema version, kind, columns and the file's length are checked. The checksum is not, for that takes the whole
    file: open what `read_shard` has verified. Reads are positioned (pread, no memory map): a file that shrinks gives
    an error, not a bus error, and forked processes may share the object.
    """

    def __init__(self, path: Path, kind: str):
        """
        Raises:
            CorruptShardError: missing or unreadable, of another schema or kind, or the header does not fit the file.
        """
        self.path = path
        try:
            self._file = io.FileIO(path)
        except OSError as error:
            raise CorruptShardError(f"{path}: cannot be opened ({error.strerror})") from None
        self._identity = _identity(os.fstat(self._file.fileno()))
        self._whole: bytearray | None = None
        try:
            header, self._columns = self._read_header()
            self.checksum: str = header.pop("xxh3")
            self.metadata = _metadata(path, kind, header)
            _check_shapes(kind, {name: (dtype, shape) for name, (dtype, shape, _) in self._columns.items()})
        except CorruptShardError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptShardError(f"{path}: not a readable shard ({error})") from None

    def __len__(self) -> int:
        return self._columns["prompt_index"][1][0]

    def __getitem__(self, column: str) -> np.ndarray:
        """A whole column."""
        return self.rows(column, 0, self._columns[column][1][0])

    def rows(self, column: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a column, [stop - start, ...] of its dtype.

        Raises:
            CorruptShardError: they cannot be read, or the file ended before them.
        """
        dtype, (length, *rest), offset = self._columns[column]
        assert 0 <= start <= stop <= length, f"{self.path}: rows {start}:{stop} of column {column} with {length}"
        width = dtype.itemsize * math.prod(rest)
        content = self._read(offset + start * width, (stop - start) * width)
        return np.frombuffer(content, dtype).reshape(stop - start, *rest)

    def is_current(self) -> bool:
        """Whether the path still names this very file, untouched."""
        try:
            return _identity(os.stat(self.path)) == self._identity
        except OSError:
            return False

    def close(self) -> None:
        """Close the file; it closes itself when nothing refers to it any more."""
        self._file.close()

    def _read_header(self) -> tuple[dict[str, Any], dict[str, Placed]]:
        """The `npd` metadata, and where the columns lie; together they fill the file."""
        size = self._identity[1]
        header = parse_header(lambda offset, wanted: self._read(offset, min(wanted, size - offset)))
        columns = {name: _placed(stored, header.end, size) for name, stored in header.tensors.items()}
        end = header.end + sum(dtype.itemsize * math.prod(shape) for dtype, shape, _ in columns.values())
        if end != size:
            raise ValueError(f"{size} bytes, the header says {end}")
        return json.loads(header.metadata["npd"]), columns

    def _read(self, offset: int, size: int) -> bytearray:
        if self._whole is None and self._identity[1] <= SMALL_BYTES:
            self._whole = self._read_part(0, self._identity[1])
        if self._whole is not None:
            return self._whole[offset : offset + size]
        return self._read_part(offset, size)

    def _read_part(self, offset: int, size: int) -> bytearray:
        content = bytearray()
        while len(content) < size:
            try:
                part = os.pread(self._file.fileno(), size - len(content), offset + len(content))
            except OSError as error:
                raise CorruptShardError(f"{self.path}: cannot be read ({error.strerror})") from None
            if not part:
                raise CorruptShardError(f"{self.path}: ends before byte {offset + size}")
            content += part
        return content


def read_or_quarantine(path: Path, kind: str) -> Shard | None:
    """Read a shard, or move a corrupt one aside (`.quarantined`) so that its work is redone; None then."""
    found = _identity(os.stat(path))
    try:
        return read_shard(path, kind)
    except CorruptShardError as error:
        aside = path.with_name(path.name + ".quarantined")
        if path.exists() and _identity(os.stat(path)) == found:  # else it was redone since, by somebody faster
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
    digest = xxh3_128(json.dumps(header, sort_keys=True).encode())
    for name in sorted(columns):
        column = columns[name]
        digest.update(f"{name} {column.dtype.str} {column.shape}".encode())
        digest.update(np.ascontiguousarray(column).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _metadata(path: Path, kind: str, header: dict[str, Any]) -> dict[str, Any]:
    """The free metadata of a header (without its checksum), once schema version and kind are as expected."""
    found = header.pop("kind", None), header.pop("schema_version", None)
    if found != (kind, SCHEMA_VERSION):
        raise CorruptShardError(f"{path}: {found[0]} of schema {found[1]}, expected {kind} of schema {SCHEMA_VERSION}")
    return header


def _placed(stored: StoredAs, start: int, size: int) -> Placed:
    """Where a column lies. `start`: of all columns; `size`: of the file."""
    dtype = np.dtype(DTYPES[stored.dtype])
    fits = start <= stored.begin <= stored.end <= size
    if not fits or stored.end - stored.begin != dtype.itemsize * math.prod(stored.shape):
        raise ValueError(f"{dtype}{stored.shape} at {stored.begin}:{stored.end} of {size} bytes")
    return dtype, stored.shape, stored.begin


def _check_columns(kind: str, columns: Mapping[str, np.ndarray]) -> None:
    """Names, dtypes, consistent dimensions and offsets, as `schema.COLUMNS` declares them."""
    _check_shapes(kind, {name: (column.dtype, column.shape) for name, column in columns.items()})
    for values, offsets in (("prompt_ids", "prompt_offsets"), ("response_ids", "response_offsets")):
        _check_offsets(offsets, columns[offsets], len(columns[values]))
    if kind == "samples":
        _check_offsets("topk_offsets", columns["topk_offsets"], len(columns["topk_ids"]))


def _check_shapes(kind: str, columns: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
    expected = COLUMNS[kind]
    if set(columns) != set(expected):
        raise ValueError(f"columns differ from the schema: {sorted(set(columns) ^ set(expected))}")
    sizes: dict[str, int] = {"N+1": columns["prompt_index"][1][0] + 1}
    for name, (dtype, dimensions) in expected.items():
        (found, shape), letters = columns[name], dimensions.split(",")
        if found != np.dtype(dtype) or len(shape) != len(letters):
            raise ValueError(f"column {name} is {found}{shape}, expected {dtype}[{dimensions}]")
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"column {name} has {size} rows along {letter}, expected {sizes[letter]}")


def _check_offsets(name: str, offsets: np.ndarray, total: int) -> None:
    if offsets[0] != 0 or offsets[-1] != total or np.any(np.diff(offsets) < 0):
        raise ValueError(f"column {name} is not a partition of {total} values")
