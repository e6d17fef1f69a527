"""Deciding whether a published version may replace the one being served, before anything is changed. No vLLM.

vLLM itself accepts a checkpoint with a tensor missing, and is left unusable by one of a wrong shape: so a version is
read, hashed and compared here in full, and a refusal leaves the engine exactly as it was.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_npd.buffer.versions import BadVersionError, verify_version
from megatron_npd.hf_config import ModelDims, read_model_dims


@dataclass(frozen=True)
class ServedVersion:
    """A policy version whose files have been verified."""

    version: int
    dims: ModelDims
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Name -> (safetensors dtype, shape)."""
    files: list[Path]
    """Its safetensors files."""


def read_version(folder: Path, version: int) -> ServedVersion:
    """Verify the published version in `folder`.

    Raises:
        BadVersionError: a file or tensor is not what the manifest says, or the manifest is another version's.
    """
    manifest = verify_version(folder)
    if manifest.version != version:
        raise BadVersionError(f"{folder}: the manifest says version {manifest.version}, expected {version}")
    return ServedVersion(version, read_model_dims(folder), manifest.tensors, sorted(folder.glob("*.safetensors")))


def check_update(served: ServedVersion, folder: Path, version: int) -> ServedVersion:
    """Verify that the version in `folder` can replace the served one, and return it.

    Raises:
        BadVersionError: it is not newer, fails verification, or differs from the served one in any tensor's name,
            shape or dtype or in the model's dimensions; the text names the file or tensor.
    """
    if version <= served.version:
        raise BadVersionError(
            f"{folder}: version {version} is not newer than version {served.version}, which is served"
        )
    new = read_version(folder, version)
    for name in sorted(served.tensors.keys() | new.tensors.keys()):
        if name not in new.tensors:
            raise BadVersionError(f"{folder}: tensor {name} is missing")
        if name not in served.tensors:
            raise BadVersionError(f"{folder}: tensor {name} is not in the served version {served.version}")
        if new.tensors[name] != served.tensors[name]:
            raise BadVersionError(
                f"{folder}: tensor {name} is {_describe(new.tensors[name])}, "
                f"must be {_describe(served.tensors[name])} as in the served version {served.version}"
            )
    old_dims, new_dims = asdict(served.dims), asdict(new.dims)
    for key in old_dims:
        if new_dims[key] != old_dims[key]:
            raise BadVersionError(f"{folder}/config.json: {key} = {new_dims[key]}, must be {old_dims[key]} as served")
    return new


def _describe(tensor: tuple[str, tuple[int, ...]]) -> str:
    return f"{tensor[0]} {list(tensor[1])}"
