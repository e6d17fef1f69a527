"""The safetensors format: eight bytes of length, a JSON header that gives each tensor's place, then all tensors' bytes.

safetensors' own library reads and writes whole files of tensors in memory. What it does not give is here, once: where
the tensors of a file lie, without reading them, and the header of a file whose tensors are to come one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_HEADER = 100_000_000
"""Bytes: safetensors' own limit."""
_LENGTH_BYTES, _ALIGNMENT = 8, 8


@dataclass(frozen=True)
class StoredAs:
    """How a tensor lies in a file."""

    dtype: str
    """The format's name of its data type, e.g. BF16."""
    shape: tuple[int, ...]
    begin: int
    """Byte of the file."""
    end: int


@dataclass(frozen=True)
class Header:
    """What the header of a file holds."""

    tensors: dict[str, StoredAs]
    metadata: dict[str, str]
    """Free text by key; empty where the file has none."""
    end: int
    """Byte of the file at which the tensors begin."""


def parse_header(read: Callable[[int, int], bytes]) -> Header:
    """The header of a file; whether it fits the file's length is for the caller to check.

    Args:
        read: gives the bytes of the file from an offset on, so many or up to its end.

    Raises:
        ValueError: what `read` gives is not the beginning of a safetensors file.
    """
    length = int.from_bytes(read(0, _LENGTH_BYTES), "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"header of {length} bytes")
    content = read(_LENGTH_BYTES, length)
    end = _LENGTH_BYTES + length
    if len(content) != length:
        raise ValueError(f"a header of {length} bytes in a file of {_LENGTH_BYTES + len(content)}")
    try:
        entries = json.loads(content)
        metadata = dict(entries.pop("__metadata__", {}))
        return Header({name: _stored_as(entry, end) for name, entry in entries.items()}, metadata, end)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no header of safetensors: {error!r}") from None


def read_header(file: Path) -> Header:
    """The header of a file, without reading its tensors.

    Raises:
        ValueError: it is not a safetensors file. OSError: it cannot be read.
    """
    with open(file, "rb") as stream:

        def read(offset: int, size: int) -> bytes:
            stream.seek(offset)
            return stream.read(size)

        return parse_header(read)


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """All that comes before the first tensor's bytes.

    Args:
        tensors: name, the format's name of the data type, shape and bytes of each, in the order in which they lie.
        metadata: free text by key.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape, nbytes in tensors:
        begin, end = end, end + nbytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)  # readers map the file: tensors begin at a multiple of their element size
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _stored_as(entry: Mapping[str, Any], start: int) -> StoredAs:
    begin, end = entry["data_offsets"]
    return StoredAs(entry["dtype"], tuple(entry["shape"]), start + begin, start + end)
