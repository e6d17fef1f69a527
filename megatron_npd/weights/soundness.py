"""Reading all of a checkpoint's weights once, before anything is paid for: are the numbers numbers, is nothing dropped?

One pass over the files, by chunks of their bytes, in a few threads. What was found sound is remembered in the user's
cache by path, size, time and inode of each file, so that it is read again only when it changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_npd.cache import CACHE_VARIABLE, cache_folder
from megatron_npd.errors import UserError
from megatron_npd.files import write_json
from megatron_npd.hardware.host import cores
from megatron_npd.models.families.family import EMBEDDING
from megatron_npd.models.hf_checkpoint import TensorFiles
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.weights.stored_frequencies import INVERSE_FREQUENCIES, check_frequencies
from megatron_npd.weights.tensor_file import StoredTensor, stored_tensors

logger = logging.getLogger(__name__)

HEAD = "lm_head.weight"
LONG_READ = 10 * 2**30
"""Bytes that take long enough for a line in a log that no one watches."""
CHUNK = 1 << 24
"""Bytes read at a time."""
VERSION = 2
"""Of what is looked for: a checkpoint that an older version found sound is read again."""


@dataclass(frozen=True)
class _Floats:
    """How a float type tells numbers from what are none: all bits of the exponent set."""

    unsigned: str
    without_sign: int
    infinity: int


FLOATS = {
    "F32": _Floats("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "BF16": _Floats("<u2", 0x7FFF, 0x7F80),
    "F16": _Floats("<u2", 0x7FFF, 0x7C00),
}


def check_weights(called: str, places: TensorFiles, dims: ModelDims) -> None:
    """Read every tensor of a checkpoint.

    Args:
        called: what messages call the checkpoint.

    Raises:
        UserError: a tensor holds NaN or infinity; config.json says that the head is tied and a head is stored that
            differs; stored rotary frequencies are not those that config.json implies.
    """
    marker = cache_folder("weights") / f"{_identity(places, dims)}.json"
    if os.path.isfile(marker):  # pathlib's raises where the folder may not be looked into
        return
    tensors = stored_tensors(places)
    _check_finite(called, tensors)
    if dims.tied_embeddings and HEAD in tensors:
        _check_same_head(called, tensors[HEAD], tensors[EMBEDDING])
    for name, stored in tensors.items():
        if name.endswith(INVERSE_FREQUENCIES):
            check_frequencies(called, name, stored, dims)
    try:
        write_json(marker, {"checkpoint": called})
    except OSError as error:
        logger.warning(
            "%s: cannot be written (%s): weights are read through by each command (%s names another folder)",
            marker.parent, error.strerror, CACHE_VARIABLE,
        )  # fmt: skip


def _identity(places: TensorFiles, dims: ModelDims) -> str:
    files = sorted(set(places.of.values()))
    states = [(str(path.resolve()), *_state(path)) for path in files]
    of = sorted((name, path.name) for name, path in places.of.items())
    text = json.dumps([VERSION, states, of, repr(dims)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _check_finite(called: str, tensors: dict[str, StoredTensor]) -> None:
    floats = {name: stored for name, stored in tensors.items() if stored.dtype_name in FLOATS}
    total = sum(stored.nbytes for stored in floats.values())
    if total >= LONG_READ and not sys.stderr.isatty():
        logger.info("%s: reading %.0f GB of weights once, for numbers that are none", called, total / 1e9)
    progress: Any = tqdm(
        total=total, desc=f"reading {called}", unit="B", unit_scale=True, disable=not sys.stderr.isatty()
    )

    def look(item: tuple[str, StoredTensor]) -> tuple[str, Path, int]:
        name, stored = item
        bad = sum(_not_finite(chunk, FLOATS[stored.dtype_name]) for chunk in _chunks(stored))
        progress.update(stored.nbytes)
        return name, stored.path, bad

    with progress, ThreadPoolExecutor(min(cores(), 8)) as pool:
        found = [(name, path, bad) for name, path, bad in pool.map(look, floats.items()) if bad]
    if found:
        name, path, bad = found[0]
        more = f" ({len(found)} such tensors)" if len(found) > 1 else ""
        raise UserError(
            f"{called}: tensor {name} of {path.name} holds {bad} value{'s' * (bad > 1)} NaN or infinite; must be "
            f"finite numbers{more}"
        )


def _not_finite(chunk: bytes, floats: _Floats) -> int:
    bits = np.frombuffer(chunk, floats.unsigned) & floats.without_sign
    if bits.size == 0 or bits.max() < floats.infinity:
        return 0
    return int(np.count_nonzero(bits >= floats.infinity))


def _check_same_head(called: str, head: StoredTensor, embedding: StoredTensor) -> None:
    alike = (head.dtype_name, head.shape) == (embedding.dtype_name, embedding.shape)
    if not alike or any(one != other for one, other in zip(_chunks(head), _chunks(embedding), strict=True)):
        raise UserError(
            f"{called}: config.json says tie_word_embeddings = true, but {HEAD} of {head.path.name} is not the "
            f"embedding; set it to false to use the stored head, or remove the tensor"
        )


def _chunks(stored: StoredTensor) -> Iterator[bytes]:
    """The bytes of a tensor. Raises UserError where the file cannot be read."""
    left = stored.nbytes
    try:
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.begin)
            while left:
                chunk = file.read(min(CHUNK, left))
                if len(chunk) < min(CHUNK, left):
                    chunk += _rest(file.fileno(), min(CHUNK, left) - len(chunk), stored.path)
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise UserError(f"{stored.path}: cannot be read ({error.strerror})") from None


def _rest(descriptor: int, size: int, path: Path) -> bytes:
    """What a short read left."""
    content = b""
    while len(content) < size:
        part = os.read(descriptor, size - len(content))
        if not part:
            raise UserError(f"{path}: was cut short while it was read")
        content += part
    return content
