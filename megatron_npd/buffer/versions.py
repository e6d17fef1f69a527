"""Published policy versions: complete Hugging Face checkpoints with a manifest, checked before use. No torch.

`weights/v000003/` appears by one rename, so it is complete when it is there. Its `version.json` lists every
tensor's dtype and shape and every file's SHA-256; `parity.json` holds fixed token sequences with the trainer's own
logprobs, by which a reader proves that it really serves this version.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_npd.run_directory import RunDirectory, read_json, write_json

MANIFEST = "version.json"
PARITY = "parity.json"
_VERSION_NAME = re.compile(r"v(\d{6})")


class BadVersionError(ValueError):
    """A published version that must not be used: the text names the file or tensor and what is wrong."""


@dataclass(frozen=True)
class VersionManifest:
    """What a version consists of."""

    version: int
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Name -> (safetensors dtype such as BF16, shape)."""
    files: dict[str, str]
    """File name -> SHA-256 of its content."""


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


def write_manifest(folder: Path, version: int) -> None:
    """Describe the safetensors files of `folder` (and hash every file in it) in its `version.json`."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(read_header(file))
    files = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    write_json(folder / MANIFEST, asdict(VersionManifest(version, tensors, files)))


def verify_version(folder: Path) -> VersionManifest:
    """Check every file of a published version against its manifest.

    Raises:
        BadVersionError: a file is missing, truncated, changed or not listed, or a tensor is not what the manifest says
            or in two files.
    """
    try:
        raw = read_json(folder / MANIFEST)
        listed = {name: (dtype, tuple(shape)) for name, (dtype, shape) in raw["tensors"].items()}
        manifest = VersionManifest(raw["version"], listed, raw["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadVersionError(f"{folder / MANIFEST}: no readable manifest ({error})") from None
    for name, digest in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise BadVersionError(f"{file}: missing, though version {manifest.version} lists it")
        if sha256(file) != digest:
            raise BadVersionError(f"{file}: content differs from the checksum of version {manifest.version}")
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    home: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in manifest.files:
            raise BadVersionError(f"{file}: not listed in the manifest of version {manifest.version}")
        header = read_header(file)
        for name in header:
            if home.setdefault(name, file.name) != file.name:
                raise BadVersionError(f"{file}: tensor {name} is also in {home[name]}")
        found.update(header)
    for name in sorted(set(found) | set(manifest.tensors)):
        if found.get(name) != manifest.tensors.get(name):
            raise BadVersionError(
                f"{folder}: tensor {name} is {found.get(name)}, the manifest says {manifest.tensors.get(name)}"
            )
    return manifest


def read_parity_probe(folder: Path) -> ParityProbe:
    """The parity probe of a published version."""
    return ParityProbe(**read_json(folder / PARITY))


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (dtype, shape) from the header of a safetensors file, without reading its data."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > 100_000_000:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        return {
            name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadVersionError(f"{file}: not a safetensors file ({error})") from None


def sha256(file: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
