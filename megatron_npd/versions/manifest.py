"""Published policy versions: complete Hugging Face checkpoints with a manifest, checked before use. No torch.

`weights/v000003/` appears by one rename, so it is complete when it is there. Its `version.json` lists every
tensor's dtype and shape and every file's SHA-256; `parity.json` holds fixed token sequences with the trainer's own
logprobs, by which a reader proves that it really serves this version.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_npd.errors import BadVersionError
from megatron_npd.files import read_json, write_json
from megatron_npd.hardware.host import cores
from megatron_npd.run_directory import RunDirectory
from megatron_npd.safetensors_format import read_header

MANIFEST = "version.json"
PARITY = "parity.json"
_VERSION_NAME = re.compile(r"v(\d{6})")
_CHUNK_BYTES = 1 << 20
"""Read, hashed and copied at once, while the processor's cache holds it."""


@dataclass(frozen=True)
class VersionManifest:
    """What a version consists of."""

    version: int
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Name -> (safetensors dtype such as BF16, shape)."""
    files: dict[str, str]
    """File name -> SHA-256 of its content."""


@dataclass(frozen=True)
class WeightFile:
    """What the writer of a safetensors file says of it, summed over the bytes it handed to the filesystem."""

    size: int
    """Bytes of the whole file."""
    sha256: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """As in `VersionManifest`."""


@dataclass(frozen=True)
class ParityProbe:
    """Token sequences and the trainer's log p(token t | tokens before t) for t >= 1, nats."""

    sequences: list[list[int]]
    logprobs: list[list[float]]


def published_versions(run: RunDirectory) -> list[int]:
    """Versions that are complete, ascending."""
    if not run.weights.is_dir():
        return []
    names = (_VERSION_NAME.fullmatch(entry.name) for entry in run.weights.iterdir())
    return sorted(int(name.group(1)) for name in names if name)


def write_manifest(folder: Path, version: int, known: Mapping[str, WeightFile] | None = None) -> None:
    """Describe the safetensors files of `folder` (and hash every file in it) in its `version.json`.

    Args:
        known: what their writers say of safetensors files, by name: those are not read again.
    """
    known = known or {}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    files: dict[str, str] = {}
    for file in sorted(file for file in folder.iterdir() if file.name != MANIFEST):
        if file.suffix == ".safetensors":
            tensors.update(known[file.name].tensors if file.name in known else _tensors_of(file))
        files[file.name] = known[file.name].sha256 if file.name in known else sha256(file)
    write_json(folder / MANIFEST, asdict(VersionManifest(version, tensors, files)))


def read_manifest(folder: Path) -> VersionManifest:
    """What a version says it consists of; nothing else is read.

    Raises:
        BadVersionError: there is no readable manifest.
    """
    try:
        raw = read_json(folder / MANIFEST)
        listed = {name: (dtype, tuple(shape)) for name, (dtype, shape) in raw["tensors"].items()}
        return VersionManifest(raw["version"], listed, dict(raw["files"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadVersionError(f"{folder / MANIFEST}: no readable manifest ({error})") from None


def verify_version(folder: Path) -> VersionManifest:
    """Check every file of a published version against its manifest.

    Raises:
        BadVersionError: a file is missing, truncated, changed or not listed, or a tensor is not what the manifest says
            or in two files.
    """
    manifest = read_manifest(folder)
    check_content(folder, manifest, copies={})
    return manifest


@contextlib.contextmanager
def verified(folder: Path, version: int) -> Iterator[VersionManifest]:
    """Hold a published version still while somebody reads its files: they are verified first, and if one is another
    one afterwards, what was read of them is refused.

    Raises:
        BadVersionError: see `verify_version`; also if it is another version than `version`, or if a file was replaced,
            written to, removed or added meanwhile.
    """
    before = _file_states(folder)
    manifest = verify_version(folder)
    require_version(folder, manifest, version)
    yield manifest
    now = _file_states(folder)
    for name in sorted(before.keys() | now.keys()):
        if now.get(name) != before.get(name):
            raise BadVersionError(f"{folder / name}: changed while it was being loaded")


def require_version(folder: Path, manifest: VersionManifest, version: int) -> None:
    """Raises `BadVersionError` unless the manifest is that of `version`."""
    if manifest.version != version:
        raise BadVersionError(f"{folder}: the manifest says version {manifest.version}, expected {version}")


def _file_states(folder: Path) -> dict[str, tuple[int, int, int]]:
    """(inode, size, time of the last change in ns) of every file in a folder: equal as long as nothing was replaced."""
    states = ((entry.name, entry.stat()) for entry in folder.iterdir()) if folder.is_dir() else ()
    return {name: (state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states}


def check_content(folder: Path, manifest: VersionManifest, copies: Mapping[str, int]) -> None:
    """Read every file of a version once, several at a time, and check it against the manifest.

    Args:
        copies: file name -> descriptor that the content is written to as it is read. What was written is what was
            checked, whatever happens to the file from then on.

    Raises:
        BadVersionError: see `verify_version`.
        MemoryError: a copy does not fit.
    """
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in manifest.files:
            raise BadVersionError(f"{file}: not listed in the manifest of version {manifest.version}")
    pool = ThreadPoolExecutor(cores())  # hashing and reading both release the interpreter's lock
    try:
        hashes = {name: pool.submit(_hash, folder / name, copies.get(name)) for name in manifest.files}
        for name, content in hashes.items():
            if content.result() != manifest.files[name]:
                raise BadVersionError(
                    f"{folder / name}: content differs from the checksum of version {manifest.version}"
                )
    finally:
        pool.shutdown(cancel_futures=True)
    _check_tensors(folder, manifest, copies)


def _hash(file: Path, copy: int | None) -> str:
    """SHA-256 of a file's content, which is read once and written to the descriptor `copy` on the way."""
    hasher, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    try:
        with open(file, "rb", buffering=0) as stream:
            while size := stream.readinto(buffer):
                hasher.update(buffer[:size])
                if copy is not None:
                    _append(copy, buffer[:size])
    except FileNotFoundError:
        raise BadVersionError(f"{file}: missing, though its version's manifest lists it") from None
    except OSError as error:
        raise BadVersionError(f"{file}: cannot be read: {error.strerror}") from None
    return hasher.hexdigest()


def _append(descriptor: int, content: memoryview) -> None:
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    except OSError as error:
        raise MemoryError(f"no memory for a copy of a published version: {error.strerror}") from None


def _check_tensors(folder: Path, manifest: VersionManifest, copies: Mapping[str, int]) -> None:
    """Names, dtypes and shapes in the headers of the weight files against the manifest's."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    home: dict[str, str] = {}
    for file in sorted(folder / name for name in manifest.files if name.endswith(".safetensors")):
        header = _tensors_of(descriptor_path(copies[file.name]) if file.name in copies else file)
        for name in header:
            if home.setdefault(name, file.name) != file.name:
                raise BadVersionError(f"{file}: tensor {name} is also in {home[name]}")
        found.update(header)
    for name in sorted(set(found) | set(manifest.tensors)):
        if found.get(name) != manifest.tensors.get(name):
            raise BadVersionError(
                f"{folder}: tensor {name} is {found.get(name)}, the manifest says {manifest.tensors.get(name)}"
            )


def descriptor_path(descriptor: int) -> Path:
    """A path by which this process and its children can open what a descriptor of this process refers to."""
    return Path(f"/proc/{os.getpid()}/fd/{descriptor}")


def read_parity_probe(folder: Path) -> ParityProbe:
    """The parity probe of a published version."""
    return ParityProbe(**read_json(folder / PARITY))


def _tensors_of(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (dtype, shape) of a safetensors file, from its header."""
    try:
        return {name: (stored.dtype, stored.shape) for name, stored in read_header(file).tensors.items()}
    except ValueError as error:
        raise BadVersionError(f"{file}: not a safetensors file ({error})") from None


def sha256(file: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
